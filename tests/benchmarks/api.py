"""What the API does in a second, beside bare Flask and bare Celery on the same machine, and how soon things are ready.

    python -m tests.benchmarks.api [--seconds 60] [--processes 1] [--json FILE]

The service is real: gunicorn as it is started everywhere, SQLite, and Redis and S3 from wheels. No image worker runs
beside it: what is measured is handing in and looking, and the queue only grows. In turns with it, in the same run:

* bare Flask under the same gunicorn, which reads the same form and stores the picture at the same S3, and no more;
* bare Celery, which sends a message with the job's id to the same Redis, and no more;
* a second service whose table holds 100,000 jobs.

Rates of a busy machine say little; the ratios of a run say more, and so do processor seconds of each request, which
are counted for the API (its sandbox included), for S3 and for the client, apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import boto3
import psutil
from celery import Celery
from flask import Flask, request
from sqlalchemy import func, select

from shared import jobs, keys, stack
from shared.db import Database, clock
from shared.models import Job, JobState, Worker
from shared.servers import Server, Started, free_port, spawn, start_redis, start_s3
from shared.settings import Settings
from shared.stack import answers, command, environ_of, prepare_sql
from tests.factories import a_claim, a_scene, many_jobs

ROOT = Path(__file__).resolve().parents[2]
SIDE_PX = 256
CONNECTIONS = 8
ROUNDS = 3
STREAMS = 8
MANY_JOBS = 100_000
STARTS = 3
START_SECONDS = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the API beside bare Flask and bare Celery.")
    parser.add_argument("--seconds", type=float, default=60, help="how long to measure; starting and filling come atop")
    parser.add_argument("--processes", type=int, default=stack.API_PROCESSES, help="processes of the API")
    parser.add_argument("--json", type=Path, help="also write everything there")
    asked = parser.parse_args()
    measured = measure(asked.seconds, processes=asked.processes)
    print(told(measured))
    if asked.json is not None:
        asked.json.write_text(json.dumps(measured, indent=2) + "\n")


def measure(seconds: float, *, processes: int = stack.API_PROCESSES) -> dict[str, Any]:
    """Everything of this page, within about `seconds` of measuring and a minute of getting ready. JSON values.

    Raises RuntimeError where an answer was not the one there should be.
    """
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        place = Place.made(folder, processes, closing)
        few = closing.enter_context(place.api("few"))
        many = closing.enter_context(place.api("many", jobs_there=MANY_JOBS))
        bare = closing.enter_context(place.bare_flask())
        celery = place.bare_celery()
        share = seconds / ROUNDS / 8
        load_before = os.getloadavg()[0]
        rounds: dict[str, list[dict[str, Any]]] = {}

        def add(name: str, figures: dict[str, Any]) -> None:
            rounds.setdefault(name, []).append(figures)

        # What only a first request does is done.
        for service in (few, many, bare):
            place.submits(service, seconds=0.5)
        for number in range(ROUNDS):
            # In turns, and each time in another order: what disturbs the machine disturbs all of them.
            turns: list[tuple[str, Callable[[], dict[str, Any]]]] = [
                ("submit", lambda: place.submits(few, seconds=2 * share)),
                ("bare_flask", lambda: place.submits(bare, seconds=share)),
                ("bare_celery", lambda: sends(celery, seconds=share / 2)),
                ("poll", lambda: place.polls(few, seconds=share)),
                ("poll_many_jobs", lambda: place.polls(many, seconds=share)),
            ]
            for name, turn in turns if number % 2 == 0 else reversed(turns):
                add(name, turn())
        events = place.events(few, seconds=seconds / 8)
        figures = {name: summed(each) for name, each in rounds.items()}
        ratios = {
            "submit_over_bare_flask": over(rounds, "submit", "bare_flask", "per_second"),
            "submit_over_bare_celery": over(rounds, "submit", "bare_celery", "per_second"),
            "submit_cpu_over_bare_flask_cpu": over(rounds, "submit", "bare_flask", "cpu_ms"),
            "poll_p50_many_over_few": over(rounds, "poll_many_jobs", "poll", "p50_ms"),
            "poll_p99_many_over_few": over(rounds, "poll_many_jobs", "poll", "p99_ms"),
        }
        starts = place.starts()
    return {
        "processes": processes,
        "connections": CONNECTIONS,
        "side_px": SIDE_PX,
        "picture_bytes": len(a_scene(SIDE_PX, SIDE_PX)),
        **figures,
        "events": events,
        "ratios": ratios,
        "starts": starts,
        "machine": {"cores": os.cpu_count(), "load_before": load_before, "load_after": os.getloadavg()[0]},
    }


def told(measured: dict[str, Any]) -> str:
    """The figures as lines of text."""
    machine = measured["machine"]
    lines = [
        f"{machine['cores']} cores, load {machine['load_before']:.1f} before and {machine['load_after']:.1f} after; "
        f"{measured['processes']} API process(es), {measured['connections']} connections, PNGs of "
        f"{measured['side_px']} px a side, {measured['picture_bytes'] / 1000:.0f} kB",
        "",
        "                  /s   p50 ms   p99 ms   CPU ms each: server   S3   client",
    ]
    for name in ("submit", "bare_flask", "bare_celery", "poll", "poll_many_jobs"):
        row = measured[name]
        lines.append(
            f"{name:14} {row['per_second']:7.1f}  {row['p50_ms']:7.2f}  {row['p99_ms']:7.2f}   {row['cpu_ms']:19.2f} "
            f"{row['s3_cpu_ms']:5.2f} {row['client_cpu_ms']:7.2f}"
        )
    events = measured["events"]
    lines += [
        "",
        f"events: {events['p50_ms']:.0f} ms p50 and {events['p99_ms']:.0f} ms p99 from commit to event, "
        f"{events['count']} of them on {STREAMS} streams, SQL looked at every {events['look_ms']:.0f} ms",
        *(f"{name}: {value:.2f}" for name, value in measured["ratios"].items()),
        *(f"{name}: {value:.2f} s" for name, value in measured["starts"].items()),
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Service:
    """One running server to hand pictures to."""

    port: int
    path: str
    process: Started
    key: str = ""
    job_ids: Sequence[str] = ()
    settings: Settings | None = None


@dataclass(frozen=True)
class Place:
    """The servers that everything measured here stands on, and the picture that is handed in."""

    folder: Path
    settings: Settings
    processes: int
    s3: Server
    picture: Path

    @classmethod
    def made(cls, folder: Path, processes: int, closing: ExitStack) -> Place:
        redis = closing.enter_context(start_redis(folder / "redis"))
        access, secret = "benchmark", uuid.uuid4().hex
        s3 = closing.enter_context(start_s3(folder / "s3", "enlarger", access, secret))
        picture = folder / "picture.png"
        picture.write_bytes(a_scene(SIDE_PX, SIDE_PX))
        settings = Settings(
            data_dir=folder,
            secret_key=uuid.uuid4().hex,
            redis_url=redis.url,
            storage_endpoint_url=s3.url,
            storage_access_key=access,
            storage_secret_key=secret,
            # What is to be measured is what can be done, not what is allowed.
            rate_limit_per_minute=10**6,
            max_queued_jobs_per_key=10**6,
        )
        return cls(folder, settings, processes, s3, picture)

    @contextmanager
    def api(self, name: str, *, jobs_there: int = 0) -> Iterator[Service]:
        """An API on a database of its own."""
        settings = self.settings.model_copy(update={"database_url": f"sqlite:///{self.folder / name}.db"})
        prepare_sql(settings)
        database = Database(settings.sqlalchemy_url)
        with database.transaction() as session:
            now = clock(session)
            key, secret = keys.create(session, name="benchmark", scopes=["jobs"], now=now)
            # The newest of all, which waits, and one in the middle, which most likely does not.
            made = many_jobs(session, key, jobs_there or 2, now=now)
            polled = [made[-1], made[(len(made) - 1) // 2]]
        database.close()
        port = free_port()
        with self.served(
            name, command("api", settings, port=port, processes=self.processes), port, settings
        ) as process:
            yield Service(port, "/v1/jobs", process, secret, polled, settings)

    @contextmanager
    def bare_flask(self) -> Iterator[Service]:
        port = free_port()
        line = command("api", self.settings, port=port, processes=self.processes)
        line[line.index("api.app:create_app()")] = "tests.benchmarks.api:bare_app()"
        with self.served("bare", line, port, self.settings) as process:
            yield Service(port, "/pictures", process)

    @contextmanager
    def served(
        self, name: str, line: Sequence[str], port: int, settings: Settings, *, once: str = "/livez"
    ) -> Iterator[Started]:
        """That command, once it answers that path with 200."""
        log_path = self.folder / f"{name}.log"
        process = spawn(line, log_path=log_path, environ=environ(settings), folder=self.folder)
        with Started(name=name, process=process, log_path=log_path) as started:
            wait(lambda: answers(f"http://127.0.0.1:{port}{once}"), f"{name} to answer: {log_path}")
            yield started

    def bare_celery(self) -> Celery:
        return Celery("bare", broker=self.settings.redis_url, set_as_current=False)

    def submits(self, service: Service, *, seconds: float) -> dict[str, Any]:
        return self._asked(service, seconds, paths=[service.path], picture=str(self.picture), status=202)

    def polls(self, service: Service, *, seconds: float) -> dict[str, Any]:
        return self._asked(service, seconds, paths=[f"/v1/jobs/{job_id}" for job_id in service.job_ids], status=200)

    def _asked(self, service: Service, seconds: float, **more: Any) -> dict[str, Any]:
        asked = {"port": service.port, "key": service.key, "connections": CONNECTIONS, "seconds": seconds, **more}
        server, s3 = cpu_seconds(service.process.process.pid), cpu_seconds(self.s3.process.pid)
        line = [sys.executable, "-m", "tests.benchmarks.client", json.dumps(asked)]
        ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise RuntimeError(ran.stderr)
        heard = json.loads(ran.stdout)
        if heard["wrong"]:
            raise RuntimeError(f"wrong answers: {heard['wrong']}")
        count = len(heard["seconds"])
        return {
            "per_second": count / heard["took"],
            **cuts(heard["seconds"]),
            "cpu_ms": 1000 * (cpu_seconds(service.process.process.pid) - server) / count,
            "s3_cpu_ms": 1000 * (cpu_seconds(self.s3.process.pid) - s3) / count,
            "client_cpu_ms": 1000 * heard["cpu_seconds"] / count,
        }

    def events(self, service: Service, *, seconds: float) -> dict[str, Any]:
        """From the commit of a running job's progress to its event at the client, over several streams at once."""
        assert service.settings is not None
        database = Database(service.settings.sqlalchemy_url)
        with database.reading() as session:
            newest = select(Job.id).where(Job.state == JobState.QUEUED).order_by(Job.id.desc()).limit(STREAMS)
            ids = session.scalars(newest).all()
        with database.transaction() as session:
            claims = [a_claim(session, job_id, clock(session)) for job_id in ids]
        heard: dict[tuple[str, int], float] = {}
        listening = [threading.Thread(target=listen, args=(service, job_id, heard)) for job_id in ids]
        for thread in listening:
            thread.start()
        said: dict[tuple[str, int], float] = {}
        look_seconds = service.settings.event_poll_seconds
        ends_at = time.monotonic() + seconds
        # The first event says how things stand; what is measured are changes.
        wait(lambda: len(heard) >= len(ids), "the streams' first events")
        while time.monotonic() < ends_at:
            for claim in claims:
                with database.transaction() as session:
                    jobs.progress(
                        session,
                        claim,
                        phase="upscale",
                        fraction=random.random(),
                        bands_done=1,
                        bands_total=2,
                        eta_seconds=1.0,
                        lease_seconds=60,
                        now=clock(session),
                    )
                    version = session.scalar(select(Job.version).where(Job.id == claim.job_id))
                said[claim.job_id, version or 0] = time.perf_counter()
            # Each change is to have a look of its own, at no moment that the looks could be in step with.
            time.sleep(look_seconds * random.uniform(1.5, 2.5))
        with database.transaction() as session:
            for claim in claims:
                jobs.cancel(session, claim.job_id, now=clock(session))
                jobs.acknowledge_cancel(session, claim, now=clock(session))
        for thread in listening:
            thread.join(30)
        database.close()
        late = [heard[change] - at for change, at in said.items() if change in heard]
        return {"count": len(late), **cuts(late), "look_ms": 1000 * look_seconds}

    def starts(self) -> dict[str, float]:
        """How long things take to start, each the quickest of a few: the files are in memory then."""
        settings = self.settings.model_copy(update={"database_url": f"sqlite:///{self.folder / 'few'}.db"})
        database = Database(settings.sqlalchemy_url)

        def api(once: str) -> None:
            port = free_port()
            line = command("api", settings, port=port, processes=self.processes)
            with self.served("start", line, port, settings, once=once):
                pass

        def worker() -> None:
            line, began = command("images", settings), time.time()
            log_path = self.folder / "images.log"
            process = spawn(line, log_path=log_path, environ=environ(settings), folder=self.folder)
            with Started(name="images", process=process, log_path=log_path) as started:
                wait(lambda: enlisted(database, began), f"the worker to enlist: {log_path}")
                started.kill()

        took = {
            "import_api_app_seconds": quickest(lambda: subprocess.run(imports("api.app"), cwd=ROOT, check=True)),
            "python_seconds": quickest(lambda: subprocess.run(imports("sys"), cwd=ROOT, check=True)),
            "api_alive_seconds": quickest(lambda: api("/livez")),
            "api_ready_seconds": quickest(lambda: api("/readyz")),
            "image_worker_seconds": quickest(worker),
        }
        database.close()
        return took


def bare_app() -> Flask:
    """Flask as one would write it in ten lines: the form is read, the picture stored, and its key answered."""
    from shared.settings import load

    app = Flask("bare")
    settings = load()
    client = boto3.client(
        "s3",
        endpoint_url=settings.storage_endpoint_url,
        aws_access_key_id=settings.storage_access_key,
        aws_secret_access_key=settings.storage_secret_key,
        region_name=settings.storage_region,
    )

    @app.get("/livez")
    def livez() -> str:
        return "ok"

    @app.post("/pictures")
    def pictures() -> tuple[dict[str, str], int]:
        key = f"bare/{uuid.uuid4().hex}"
        client.put_object(Bucket=settings.storage_bucket, Key=key, Body=request.files["image"].read())
        return {"key": key}, 202

    return app


def sends(celery: Celery, *, seconds: float) -> dict[str, Any]:
    """Messages sent one after the other by `send_task`, Celery's own settings, from this process."""
    took: list[float] = []
    began, cpu_began = time.perf_counter(), time.process_time()
    while (sent_at := time.perf_counter()) < began + seconds or len(took) < 2:
        celery.send_task("bare", args=[uuid.uuid4().hex], queue="bare", ignore_result=True)
        took.append(time.perf_counter() - sent_at)
    return {
        "per_second": len(took) / (time.perf_counter() - began),
        **cuts(took),
        "cpu_ms": 1000 * (time.process_time() - cpu_began) / len(took),
        "s3_cpu_ms": 0.0,
        "client_cpu_ms": 0.0,
    }


def listen(service: Service, job_id: str, heard: dict[tuple[str, int], float]) -> None:
    """Follows one job to its end and notes when each version was heard of."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        head = (
            f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {service.key}\r\n\r\n"
        )
        connection.sendall(head.encode())
        with connection.makefile("rb") as lines:
            for line in lines:
                if line.startswith(b"id: "):
                    heard.setdefault((job_id, int(line[4:])), time.perf_counter())
                if line.startswith(b"event: done"):
                    return


def summed(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds, and all of them."""
    middle = {name: median(each[name] for each in rounds) for name in rounds[0]}
    return {**middle, "rounds": list(rounds)}


def over(rounds: dict[str, list[dict[str, Any]]], one: str, other: str, name: str) -> float:
    """The median of the rounds' ratios."""
    return median(a[name] / b[name] for a, b in zip(rounds[one], rounds[other], strict=True))


def cuts(seconds: Sequence[float]) -> dict[str, float]:
    hundredths = quantiles(seconds, n=100, method="inclusive")
    return {"p50_ms": 1000 * hundredths[49], "p99_ms": 1000 * hundredths[98]}


def cpu_seconds(pid: int) -> float:
    """Of the process, its children, and those of them that have ended."""
    top = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:4]) for process in (top, *top.children(recursive=True)))


def quickest(act: Callable[[], object]) -> float:
    took = []
    for _ in range(STARTS):
        began = time.perf_counter()
        act()
        took.append(time.perf_counter() - began)
    return min(took)


def imports(module: str) -> list[str]:
    return [sys.executable, "-c", f"import {module}"]


def enlisted(database: Database, since: float) -> bool:
    with database.reading() as session:
        newest = session.scalar(select(func.max(Worker.started_at)).where(Worker.kind == "images"))
    return newest is not None and newest.timestamp() >= since


def environ(settings: Settings) -> dict[str, str]:
    return {**os.environ, **environ_of(settings), "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}


def wait(until: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + START_SECONDS
    while not until():
        if time.monotonic() > ends_at:
            raise RuntimeError(f"waited {START_SECONDS:g} s for {what}")
        time.sleep(0.005)


if __name__ == "__main__":
    main()
