"""Two hosts, as the kernel sees them: image workers in network namespaces of their own, each with its own address and
name, from which SQL, Redis and S3 can be reached and nothing else. One is cut off in the middle of a job.

Their cables end in a third namespace, the hub. In this one they would be new network interfaces for everybody: Chromium
drops what it is loading whenever one comes or goes, and the pages' tests run beside these.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import safetensors.torch
import torch
from spandrel.architectures.Compact import Compact as SRVGGNetCompact
from sqlalchemy import select, true
from sqlalchemy.engine import make_url

import migrations
from shared import calibration, catalog, jobs, own_models, queueing, stack
from shared.db import Database, clock
from shared.jobs import JobInput
from shared.models import Attempt, Job, JobState, Worker
from shared.outbox import Broker
from shared.servers import Server
from shared.settings import Settings
from shared.storage import Storage
from tests.conftest import STACK_SETTINGS, new_postgresql_database, wait_until
from tests.factories import a_key, a_png, options
from worker import relay
from worker.networks import CALIBRATION_PX

SIDE_PX = 72
"""At 24 px a tile a job of this size takes seconds: long enough to be met in the middle."""
LOST_AFTER_SECONDS = 6.0

HUB = f"enl-{os.getpid()}-hub"
CLONE_NEWNET = 0x40000000


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"enl-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="network namespaces need root and iproute2"),
]


def listener_in(namespace: str, host: str) -> socket.socket:
    """A server's socket that hears what reaches `host` in another network namespace than this process's."""

    def made() -> socket.socket:
        with Path("/run/netns", namespace).open() as there:
            if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
        return socket.create_server((host, 0))

    # A thread of its own enters it, and ends; the socket stays where it was made.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


class Door:
    """Lets what connects to `host` in the hub through to one server of this machine's loopback interface, on a port of
    its own."""

    def __init__(self, host: str, port: int) -> None:
        self._listener = listener_in(HUB, host)
        self._target = ("127.0.0.1", port)
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                outside, _ = self._listener.accept()
            except OSError:
                return
            inside = socket.create_connection(self._target)
            self._open += [outside, inside]
            for source, target in ((outside, inside), (inside, outside)):
                threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()

    def close(self) -> None:
        # Wakes the thread that accepts.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """One direction of a connection, until either end is over; then both are."""
    with suppress(OSError):
        while chunk := source.recv(65536):
            target.sendall(chunk)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Host:
    """A namespace at the other end of a cable from the hub, with one image worker."""

    name: str
    link: str
    process: subprocess.Popen[bytes]

    def cut_off(self) -> None:
        ip("-n", HUB, "link", "set", self.link, "down")

    def reconnect(self) -> None:
        ip("-n", HUB, "link", "set", self.link, "up")


MEASURED_QUICKEST: dict[str, calibration.Runtime] = {"host-1": "torch", "host-2": "ncnn"}


def a_disk(folder: Path, number: int) -> Path:
    """What a host has for itself: its own models, one of them under a name that the other host uses too, and what it
    has measured, which here is made up so that nobody can take it for the other's; slow, as a busy machine is."""
    models = folder / "models"
    models.mkdir(parents=True)
    for name, seed in ((["one", "two"][number - 1], 0), ("both", number)):
        torch.manual_seed(seed)
        weights = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=2).state_dict()
        safetensors.torch.save_file(weights, models / f"{name}.safetensors")
    card = catalog.card("srgan")
    assert card.weights is not None
    quickest = MEASURED_QUICKEST[f"host-{number}"]
    speeds = {runtime: 2e3 * number if runtime == quickest else 1.0 for runtime in ("torch", "ncnn")}
    machine = calibration._machine("cpu", 1)
    found = {"model": "srgan", "scale": 4, "machine": machine, "runtime": quickest, "pixels_per_second": speeds}
    (folder / "enlarger").mkdir()
    key = f"{card.weights.sha256} 4 {CALIBRATION_PX**2} {machine}"
    (folder / "enlarger" / "calibration.json").write_text(json.dumps({key: found}))
    return folder


def a_host(closing_all: ExitStack, number: int, settings: Settings, folder: Path) -> Host:
    """Made, cabled and at work; `settings` name servers of this machine's loopback interface."""
    # Names of links are short: 15 signs.
    name, link = f"enl-{os.getpid()}-{number}", f"enl{os.getpid()}-{number}"
    here, there = f"10.213.{number}.1", f"10.213.{number}.2"
    ip("netns", "add", name)
    closing_all.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
    ip("-n", HUB, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("-n", HUB, "address", "add", f"{here}/30", "dev", link)
    ip("-n", HUB, "link", "set", link, "up")
    ip("-n", name, "address", "add", f"{there}/30", "dev", "eth0")
    ip("-n", name, "link", "set", "eth0", "up")
    ip("-n", name, "link", "set", "lo", "up")

    def through_a_door(url: str) -> str:
        parts = urlsplit(url)
        door = closing_all.enter_context(closing(Door(here, parts.port or 0)))
        return url.replace(f"{parts.hostname}:{parts.port}", f"{here}:{door.port}")

    disk = a_disk(folder / f"host-{number}", number)
    theirs = settings.model_copy(
        update={
            "data_dir": disk,
            "models_dir": str(disk / "models"),
            "database_url": through_a_door(settings.database_url),
            "redis_url": through_a_door(settings.redis_url),
            "storage_endpoint_url": through_a_door(settings.storage_endpoint_url),
        }
    )
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith("ENLARGER_")},
        **stack.environ_of(theirs),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "TMPDIR": str(disk),
        "XDG_CACHE_HOME": str(disk),
        "NO_PROXY": "*",
    }
    words = stack.command("images", theirs)
    named = ["unshare", "--uts", "sh", "-c", f'hostname host-{number}; exec "$@"', "sh", *words]
    log = closing_all.enter_context((folder / f"host-{number}.log").open("wb"))
    process = subprocess.Popen(
        ["ip", "netns", "exec", name, *named],
        env=stack.environ_for("images", environ),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=folder,
    )
    closing_all.callback(process.wait)
    closing_all.callback(os.killpg, process.pid, 9)
    return Host(f"host-{number}", link, process)


@dataclass
class Fleet:
    database: Database
    storage: Storage
    hosts: dict[str, Host]
    key_id: str

    def submit(self, count: int, **asked: Any) -> list[str]:
        picture = a_png(SIDE_PX, SIDE_PX)
        ids = []
        with self.database.transaction() as session:
            now = clock(session)
            for _ in range(count):
                job_id = jobs.new_job_id(now)
                prefix = jobs.blob_prefix(job_id)
                facts = (SIDE_PX, SIDE_PX, "png", len(picture), hashlib.sha256(picture).hexdigest())
                handed_in = JobInput(job_id, prefix, f"{prefix}/input", *facts)
                self.storage.put(handed_in.key, io.BytesIO(picture), "image/png")
                jobs.submit(
                    session,
                    owner_key_id=self.key_id,
                    options=options(**asked),
                    picture=handed_in,
                    max_attempts=3,
                    max_queued_jobs=1000,
                    now=now,
                )
                ids.append(job_id)
        return ids

    def working(self) -> dict[str, str]:
        """host -> the job that it works on, as its row says; hosts that have said nothing yet are left out."""
        with self.database.reading() as session:
            rows = session.execute(select(Worker.host, Worker.current_job_id).where(Worker.kind == "images")).all()
        return {row.host: row.current_job_id or "" for row in rows}

    def attempts(self, job_id: str) -> list[tuple[str, str | None]]:
        """(host, outcome) of each attempt at the job, in order."""
        with self.database.reading() as session:
            rows = session.execute(
                select(Worker.host, Attempt.outcome)
                .join(Worker, Worker.id == Attempt.worker_id)
                .where(Attempt.job_id == job_id)
                .order_by(Attempt.number)
            )
            return [(row.host, row.outcome) for row in rows]

    def unfinished(self, *ids: str) -> int:
        """How many of these jobs, or of all."""
        with self.database.reading() as session:
            states = session.scalars(select(Job.state).where(Job.id.in_(ids) if ids else true())).all()
        assert JobState.FAILED not in states
        return sum(state != JobState.SUCCEEDED for state in states)

    def hosts_of(self, ids: Sequence[str]) -> set[str]:
        return {host for job_id in ids for host, _ in self.attempts(job_id)}

    def workers(self) -> dict[str, Worker]:
        """host -> the row of its image worker."""
        with self.database.reading() as session:
            return {row.host: row for row in session.scalars(select(Worker).where(Worker.kind == "images"))}

    def waits_for(self, job_id: str) -> str | None:
        with self.database.reading() as session:
            job = session.get_one(Job, job_id)
            return queueing.waits_for(session, job, worker_lost_after_seconds=LOST_AFTER_SECONDS, now=clock(session))


@pytest.fixture
def fleet(
    postgresql_server: Server, redis_url: str, s3: Any, settings: Settings, storage: Storage, tmp_path: Path
) -> Iterator[Fleet]:
    with ExitStack() as closing_all:
        url = closing_all.enter_context(new_postgresql_database(postgresql_server.url, "enlarger_hosts"))
        migrations.upgrade(url)
        database = closing_all.enter_context(closing(Database(url)))
        here = settings.model_copy(
            update={
                **STACK_SETTINGS,
                "database_url": make_url(url).render_as_string(hide_password=False),
                "worker_concurrency": 1,
                "torch_threads": 1,
                "worker_lost_after_seconds": LOST_AFTER_SECONDS,
                "worker_device": "cpu",
            }
        )
        with database.transaction() as session:
            key = a_key(session, clock(session))
        # The relay stays on this side, as it would on a third host.
        stopping = threading.Event()
        broker = Broker(here)
        closing_all.callback(broker.close)
        steps = relay.steps(database, broker, here, stopping)
        running = threading.Thread(target=relay.run, args=(steps, stopping))
        running.start()
        closing_all.callback(running.join)
        closing_all.callback(stopping.set)
        ip("netns", "add", HUB)
        closing_all.callback(subprocess.run, ["ip", "netns", "del", HUB], capture_output=True)
        hosts = {f"host-{n}": a_host(closing_all, n, here, tmp_path) for n in (1, 2)}
        made = Fleet(database, storage, hosts, key.id)
        wait_until(lambda: set(made.working()) == set(hosts), seconds=200, what="both hosts to enlist")
        yield made


def test_a_host_that_is_cut_off_in_mid_job_loses_nothing(fleet: Fleet) -> None:
    # Given jobs on both hosts,
    ids = fleet.submit(4)
    wait_until(lambda: all(fleet.working().values()), seconds=60, what="both hosts to have a job")
    # when one's cable is pulled,
    lost = fleet.working()["host-1"]
    fleet.hosts["host-1"].cut_off()
    # then the other does all that is left, the lost one's job among it, and each has one result.
    wait_until(lambda: fleet.unfinished() == 0, seconds=200, what="every job to succeed")
    assert fleet.attempts(lost)[:2] == [("host-1", "lost"), ("host-2", "succeeded")]
    assert fleet.hosts_of(ids) == {"host-1", "host-2"}
    # And when the cable is back, the host has changed nothing of that, and works again.
    fleet.hosts["host-1"].reconnect()

    def works_again() -> bool:
        more = fleet.submit(2)
        wait_until(lambda: fleet.unfinished() == 0, seconds=100, what="two more jobs to succeed")
        return "host-1" in fleet.hosts_of(more)

    wait_until(works_again, seconds=200, what="the host that was cut off to work again")
    assert fleet.attempts(lost)[:2] == [("host-1", "lost"), ("host-2", "succeeded")]
    with fleet.database.reading() as session:
        keys = {job.id: job.result_key for job in session.scalars(select(Job))}
    for job_id, key in keys.items():
        assert key is not None
        results = [each for each in fleet.storage.keys(f"jobs/{job_id}/") if "/result-" in each]
        assert key in results


def test_hosts_with_other_models_and_other_speeds_do_what_only_they_can(fleet: Fleet) -> None:
    assert_reaches_nothing_but_its_servers()
    # Given hosts with a model each that the other lacks, and files of one name that differ,
    with fleet.database.reading() as session:
        now = clock(session)
        assert [card.name for card in own_models.offered(session, now=now)] == ["both", "one", "two"]
        [clash] = own_models.clashes(session, worker_lost_after_seconds=LOST_AFTER_SECONDS, now=now)
    assert clash.name == "both"
    assert sorted(clash.hosts_by_sha256.values()) == [("host-1",), ("host-2",)]
    told = {host: set(row.models or ()) for host, row in fleet.workers().items()}
    assert (told["host-1"] - told["host-2"], told["host-2"] - told["host-1"]) == ({"one"}, {"two"})
    # each of which has been measured to be quickest with another runtime,
    wait_until(lambda: all(row.speeds for row in fleet.workers().values()), seconds=30, what="both to tell speeds")
    speeds = {host: (row.speeds or {})["srgan"] for host, row in fleet.workers().items()}
    assert {host: speed["runtime"] for host, speed in speeds.items()} == MEASURED_QUICKEST
    assert speeds["host-1"]["pixels_per_second"] == 2_000
    assert speeds["host-2"]["pixels_per_second"] == 4_000
    # when jobs come for each, they are done where they can be.
    ones, twos = (fleet.submit(3, model=name, needs=name, scale=2) for name in ("one", "two"))
    wait_until(lambda: fleet.unfinished() == 0, seconds=100, what="every job to succeed")
    assert (fleet.hosts_of(ones), fleet.hosts_of(twos)) == ({"host-1"}, {"host-2"})
    # When one host is cut off, the jobs for its model wait and say why, and hold up no other behind them.
    fleet.hosts["host-1"].cut_off()
    ones = fleet.submit(3, model="one", needs="one", scale=2)
    assert fleet.waits_for(ones[0]) is None, "it was heard of a moment ago"
    others = [*fleet.submit(1), *fleet.submit(1, model="two", needs="two", scale=2)]
    wait_until(lambda: fleet.unfinished(*others) == 0, seconds=100, what="the other jobs to succeed")
    assert fleet.hosts_of(others) == {"host-2"}
    said = "No live worker of cpu.interactive has the model one: the job waits until one does."
    wait_until(lambda: fleet.waits_for(ones[0]) == said, seconds=30, what="a job to say that nobody can run it")
    assert fleet.unfinished(*ones) == 3
    # And when it is back, it does them.
    fleet.hosts["host-1"].reconnect()
    wait_until(lambda: fleet.unfinished() == 0, seconds=200, what="the jobs that waited to succeed")
    assert fleet.hosts_of(ones) == {"host-1"}
    assert fleet.waits_for(ones[0]) is None


def assert_reaches_nothing_but_its_servers() -> None:
    # Some server of this machine that no door leads to.
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        name = f"enl-{os.getpid()}-1"
        ran = subprocess.run(["ip", "netns", "exec", name, sys.executable, "-c", program], capture_output=True)
    assert ran.returncode != 0
    assert b"refused" in ran.stderr
