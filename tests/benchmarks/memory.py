"""What memory a large picture takes: an image worker's peak over its idle level, by network, format and size.

    python -m tests.benchmarks.memory [--megapixels 12,24,48] [--models srgan,lanczos] [--formats png,tiff]
    python -m tests.benchmarks.memory --widths 4000,6000,8000     # the networks alone, in strips

Each figure comes from a fresh process that is a whole image worker (decoder in its sandbox, SQL, real S3) and makes one
attempt at one job, after a tiny one of the same kind. The peak is the kernel's own (VmHWM), set back before the job, so
that nothing between two samples is missed; pages mapped from the decoder's child count in it. The processes of one
round take turns, so that a busy moment of the machine does not fall on one kind only.

A network that is too slow for whole pictures is stopped after `--seconds`: by then every band has taken what it takes,
and the figure is marked as of a part: all but the picture's end, where every layer makes up for its delay. That the
end is no more is what the networks alone are for: a low picture of each width, from its top to its end, and nothing
else of a worker. Low pictures through a whole worker (`--megapixels 4000x160,8000x160`) show the same.

What is promised is 1.5 GB, and a tenth more at most for four times the picture; each line says whether it is held.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import migrations
from shared import jobs, keys
from shared.catalog import card
from shared.db import Database, clock
from shared.jobs import JobInput, JobOptions
from shared.models import Job
from shared.pictures import format_named
from shared.servers import start_s3
from shared.settings import load
from shared.storage import Storage
from worker import upscale
from worker.execute import Executor
from worker.networks import load as load_network

ACCESS_KEY, SECRET_KEY, BUCKET = "memory", "a secret of this measurement", "memory"
STOP_AFTER_SECONDS = 60.0
MOST_PEAK_MB, MOST_GROWTH = 1500, 1.10
ALONE_ROWS = 110
"""Of a picture for a network alone: the first strips, some in the middle, and the last."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory that large pictures take.")
    parser.add_argument("--megapixels", default="12,24,48", help="sizes of the inputs; or 4000x300: whole low pictures")
    parser.add_argument("--models", default="srgan,lanczos", help="the networks")
    parser.add_argument("--formats", default="png,jpeg", help="of the results")
    parser.add_argument("--input", default="jpeg", choices=("jpeg", "png"), help="what the inputs are written as")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=STOP_AFTER_SECONDS, help="longest that a network may run")
    parser.add_argument("--widths", default="", help="measure the networks alone, over pictures so many px wide")
    parser.add_argument("--tile-px", type=int, default=0, help="longest side of a tile; 0 plans as the service does")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one = json.loads(asked.one)
        print(json.dumps(_alone(**one) if "width" in one else _one(**one)))
        return
    if asked.widths:
        widths = [int(each) for each in asked.widths.split(",")]
        measured = measure_alone(widths=widths, models=asked.models.split(","), told=True)
        if asked.json:
            asked.json.write_text(json.dumps(measured, indent=1) + "\n")
        return
    measured = measure(
        sizes=asked.megapixels.split(","),
        models=asked.models.split(","),
        formats=asked.formats.split(","),
        input=asked.input,
        rounds=asked.rounds,
        stop_after_seconds=asked.seconds,
        tile_px=asked.tile_px,
        told=True,
    )
    if asked.json:
        asked.json.write_text(json.dumps(measured, indent=1) + "\n")


def measure(
    *,
    sizes: Sequence[str] = ("12", "24", "48"),
    models: Sequence[str] = ("srgan", "lanczos"),
    formats: Sequence[str] = ("png", "jpeg"),
    input: str = "jpeg",
    rounds: int = 1,
    stop_after_seconds: float = STOP_AFTER_SECONDS,
    tile_px: int = 0,
    told: bool = False,
) -> dict[str, Any]:
    """The figures: `peaks`, one entry for each network, format and size with the greatest of its rounds, and `growth`,
    the peak of the last size over that of the first. Sizes are megapixels of 4:3, or width x height. Bytes are in MB of
    10^6. `told` prints each as it comes."""
    peaks: dict[tuple[str, str, str], dict[str, Any]] = {}
    with _servers() as environ, tempfile.TemporaryDirectory() as folder:
        pictures = {size: _picture(Path(folder), size, input) for size in sizes}
        if told:
            print("model              result     input  result MP  peak over idle MB  decoder MB      s  1.5 GB")
        for _ in range(rounds):
            for model in models:
                for format in formats:
                    for size, path in pictures.items():
                        one = {"model": model, "format": format, "path": str(path), "seconds": stop_after_seconds}
                        # With SQL of its own: a job of which a part was made would wait there, and be first.
                        with tempfile.TemporaryDirectory() as data:
                            own = {"ENLARGER_TILE_PX": str(tile_px), "ENLARGER_DATA_DIR": data}
                            found = _in_a_fresh_process(one, {**environ, **own})
                        key = (model, format, size)
                        if key not in peaks or found["peak_mb"] > peaks[key]["peak_mb"]:
                            peaks[key] = {"model": model, "format": format, "input": size, **found}
                        if told:
                            print(
                                f"{model:18} {format:6} {size:>9} {found['result_mp']:10.0f} {found['peak_mb']:18.0f} "
                                f"{found['decoder_mb']:11.0f} {found['seconds']:6.1f}  {_held(found)}"
                                f"{', ' + found['part'] if found['part'] else ''}",
                                flush=True,
                            )
    growth = {
        f"{model} {format}": round(
            peaks[model, format, sizes[-1]]["peak_mb"] / peaks[model, format, sizes[0]]["peak_mb"], 3
        )
        for model in models
        for format in formats
    }
    if told:
        _tell_growth(growth)
    return {"peaks": list(peaks.values()), "growth": growth}


def measure_alone(
    *, widths: Sequence[int] = (4000, 6000, 8000), models: Sequence[str] = ("srgan",), told: bool = False
) -> dict[str, Any]:
    """The same of networks alone, in strips: `peaks` by network and width, and `growth`."""
    peaks: dict[tuple[str, int], dict[str, Any]] = {}
    if told:
        print("model               width   peak over idle MB   estimated MB   parts   waste      s   1.5 GB")
    for model in models:
        for width in widths:
            found = _in_a_fresh_process({"model": model, "width": width}, dict(os.environ))
            peaks[model, width] = {"model": model, "width": width, **found}
            if told:
                print(
                    f"{model:18} {width:6} {found['peak_mb']:19.0f} {found['estimated_mb']:14.0f} {found['parts']:7} "
                    f"{found['waste']:7.3f} {found['seconds']:6.1f}   {_held(found)}",
                    flush=True,
                )
    growth = {
        model: round(peaks[model, max(widths)]["peak_mb"] / peaks[model, min(widths)]["peak_mb"], 3) for model in models
    }
    if told:
        _tell_growth(growth)
    return {"peaks": list(peaks.values()), "growth": growth}


def _held(found: dict[str, Any]) -> str:
    return "held" if found["peak_mb"] <= MOST_PEAK_MB else "BROKEN"


def _tell_growth(growth: dict[str, float]) -> None:
    print("growth of the peak, last over first:")
    for name, factor in growth.items():
        print(f"    {name:25} {factor:6.3f}   {'held' if factor < MOST_GROWTH else 'BROKEN'}")


@contextmanager
def _servers() -> Iterator[dict[str, str]]:
    """The environment of an image worker with an S3 server and a database of its own."""
    with tempfile.TemporaryDirectory() as folder, start_s3(Path(folder) / "s3", BUCKET, ACCESS_KEY, SECRET_KEY) as s3:
        yield {
            **os.environ,
            "ENLARGER_DATA_DIR": folder,
            "ENLARGER_SECRET_KEY": "a secret of this measurement",
            "ENLARGER_STORAGE_ENDPOINT_URL": s3.url,
            "ENLARGER_STORAGE_BUCKET": BUCKET,
            "ENLARGER_STORAGE_ACCESS_KEY": ACCESS_KEY,
            "ENLARGER_STORAGE_SECRET_KEY": SECRET_KEY,
            "ENLARGER_LOG_LEVEL": "warning",
            "ENLARGER_WORKER_DEVICE": "cpu",
            "ENLARGER_MAX_UPLOAD_BYTES": "1000000000",
        }


def _picture(folder: Path, size: str, format: str = "jpeg") -> Path:
    """A made photograph: soft shapes, and noise so that it compresses about as photographs do."""
    if "x" in size:
        width, height = (int(side) for side in size.split("x"))
    else:
        width = round((float(size) * 1e6 * 4 / 3) ** 0.5)
        height = round(float(size) * 1e6 / width)
    chance = np.random.default_rng(1)
    small = Image.fromarray(chance.integers(0, 256, (40, 53, 3), dtype=np.uint8))
    rgb = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).copy()
    tile = chance.integers(0, 12, (997, 991, 1), dtype=np.uint8)
    for y in range(0, height, 997):
        for x in range(0, width, 991):
            part = rgb[y : y + 997, x : x + 991]
            part //= 2
            part += 60 + tile[: part.shape[0], : part.shape[1]]
    path = folder / f"{size}.{format}"
    Image.fromarray(rgb).save(path, format.upper(), **({"quality": 90} if format == "jpeg" else {"compress_level": 1}))
    return path


def _in_a_fresh_process(one: dict[str, Any], environ: dict[str, str]) -> dict[str, Any]:
    line = [sys.executable, "-m", "tests.benchmarks.memory", "--one", json.dumps(one)]
    done = subprocess.run(line, env=environ, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _one(*, model: str, format: str, path: str, seconds: float) -> dict[str, Any]:
    """The figures of one job, in this process."""
    settings = load()
    # By a process of its own: what it took to hand them in would count as idle in this one.
    with ProcessPoolExecutor(1, get_context("spawn")) as customer:
        tiny_id, job_id, pixels = customer.submit(_hand_in, model=model, format=format, path=path).result()
    database, storage = Database(settings.sqlalchemy_url), Storage(settings)
    executor = Executor.start(settings, queues=["cpu.interactive"])
    executor.run(tiny_id)
    gc.collect()
    idle, decoder_idle = _status("VmRSS"), _status("VmRSS", _decoder_pid(executor))
    Path("/proc/self/clear_refs").write_text("5")
    stop = threading.Timer(seconds, executor.ask_to_stop)
    stop.daemon = True
    stop.start()
    began = time.perf_counter()
    executor.run(job_id)
    took = time.perf_counter() - began
    stop.cancel()
    peak = _status("VmHWM")
    with database.reading() as session:
        job = session.get_one(Job, job_id)
    assert job.state in ("succeeded", "queued"), job.error_detail
    decoder = executor._decoder
    assert decoder is not None
    spent = decoder.sandbox.last_spent
    assert spent is not None
    executor.stop()
    storage.remove("")
    return {
        "result_mp": round(16 * pixels / 1e6, 1),
        "idle_mb": round(idle / 1e6),
        "peak_mb": round((peak - idle) / 1e6, 1),
        # What the child held of its own, and the pixels that it wrote.
        "decoder_mb": round((spent.peak_bytes - decoder_idle + 3 * pixels) / 1e6, 1),
        "seconds": round(took, 1),
        "part": None if job.state == "succeeded" else "of a part",
        "timings": job.timings,
    }


def _hand_in(*, model: str, format: str, path: str) -> tuple[str, str, int]:
    """A job for a tiny picture and one for that of `path`: their ids, and the pixels of the latter."""
    settings = load()
    migrations.upgrade(settings.sqlalchemy_url)
    database, storage = Database(settings.sqlalchemy_url), Storage(settings)
    with database.transaction() as session:
        owner = keys.create(session, name="memory", scopes=("jobs",), now=clock(session))[0].id
    tiny = io.BytesIO()
    Image.effect_noise((96, 64), 50).convert("RGB").save(tiny, "JPEG")
    job_ids = [
        submitted(database, storage, picture, owner, model=model, format=format)
        for picture in (tiny.getvalue(), Path(path).read_bytes())
    ]
    with Image.open(path) as opened:
        return job_ids[0], job_ids[1], opened.width * opened.height


def _alone(*, model: str, width: int) -> dict[str, Any]:
    """The figures of one network over one low picture, in this process."""
    upscale.prepare_process(0)
    network = load_network(card(model), "cpu")
    network.warm_up()
    if network.runtime != "ncnn":
        raise SystemExit(f"{model} does not run in strips here.")
    gc.collect()
    idle = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    chance = np.random.default_rng(1)
    began = time.perf_counter()
    pieces = (chance.random((3, min(16, ALONE_ROWS - y), width), np.float32) for y in range(0, ALONE_ROWS, 16))
    for _ in network.rows(pieces):
        pass
    took = time.perf_counter() - began
    spans = network.columns(width)
    return {
        "idle_mb": round(idle / 1e6),
        "peak_mb": round((_status("VmHWM") - idle) / 1e6, 1),
        "estimated_mb": round(network.strips_bytes(width) / 1e6, 1),
        "parts": len(spans),
        "waste": round(sum(read.stop - read.start for _, read in spans) / width, 3),
        "seconds": round(took, 1),
    }


def submitted(database: Database, storage: Storage, picture: bytes, owner_key_id: str, **asked: Any) -> str:
    """The id of a queued job for the picture, stored as the API stores it; `asked` are fields of JobOptions."""
    with Image.open(io.BytesIO(picture)) as opened:
        width, height, named = opened.width, opened.height, str(opened.format).lower()
    with database.transaction() as session:
        now = clock(session)
        job_id = jobs.new_job_id(now)
        prefix = jobs.blob_prefix(job_id)
        storage.put(f"{prefix}/input", io.BytesIO(picture), format_named(named).mime_type)
        jobs.submit(
            session,
            owner_key_id=owner_key_id,
            options=JobOptions(**{"scale": 4, "queue": "cpu.interactive", **asked}),
            picture=JobInput(
                job_id,
                prefix,
                f"{prefix}/input",
                width,
                height,
                named,
                len(picture),
                hashlib.sha256(picture).hexdigest(),
            ),
            max_attempts=3,
            max_queued_jobs=1000,
            now=now,
        )
    return job_id


def _decoder_pid(executor: Executor) -> int:
    assert executor._decoder is not None
    pid = executor._decoder.sandbox.pid
    assert pid is not None
    return pid


def _status(field: str, pid: int | str = "self") -> int:
    """Bytes of one line of /proc/<pid>/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


if __name__ == "__main__":
    main()
