"""One big picture by two image workers of one thread each, over the same by one: is the wall time halved?

    python -m tests.benchmarks.shards [--size 448x2400] [--shards 16] [--rounds 3] [--model srgan] [--json FILE]

A whole service on this machine: HTTP, SQL, Redis, S3, two image processes. One of them is drained in every other
round, so that both kinds take turns in the same service. Seconds are from claim to success, in the database's clock;
medians. `--shards` is what the service's settings would make of a picture of 32 million px; a smaller picture is cut
as often, so that what is lost between shards weighs more here than there.

    bare        two processes that do nothing but run the network, over pictures as wide, over one alone: what this
                machine can give
    unsplit     one worker, the picture not shared: what sharing costs where nobody helps
    one, two    workers, the picture shared; `speed_up` is one over two, `of_bare` that over `bare`
    network     seconds of each worker's network; `idle` what each had left of the time: it decoded, waited for the
                last shards of others, stored and joined

A worker of one thread keeps more than one core busy: beside its network it encodes, compares and stores. So on two
cores one worker has more than half of what two have. With `--pinned` every worker, the bare ones too, has one core for
all that it does, and two have twice as much.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from sqlalchemy import select

from shared import shards, workers
from shared.catalog import card
from shared.db import Database, clock
from shared.models import Job, Shard, Worker
from shared.servers import free_port
from shared.settings import Settings
from shared.stack import Stack
from tests.benchmarks.runtimes import machine
from worker.networks import load
from worker.upscale import enlarge, prepare_process

LONGEST_SECONDS = 3600.0
LOOK_SECONDS = 0.25
BARE_SECONDS = 20.0
"""As long as jobs take: a virtual machine may give two cores for some seconds and less of them for long."""
BARE_HEIGHT_PX = 150


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one big picture by one worker and by two.")
    parser.add_argument("--size", default="448x2400", help="of the picture handed in, px")
    parser.add_argument("--shards", type=int, default=16, help="into how many it is cut, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="srgan")
    parser.add_argument("--shared-only", action="store_true", help="leave out the picture that is not shared")
    parser.add_argument("--pinned", action="store_true", help="each worker on one core, another for each")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--bare", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    width, height = map(int, asked.size.split("x"))
    if asked.bare is not None:
        print(_bare_here(asked.model, asked.bare, width))
        return
    measured = measure(
        width,
        height,
        pieces=asked.shards,
        rounds=asked.rounds,
        model=asked.model,
        unsplit=not asked.shared_only,
        pinned=asked.pinned,
    )
    print(json.dumps(measured, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(measured, indent=1) + "\n")


def measure(
    width: int,
    height: int,
    *,
    pieces: int = 16,
    rounds: int = 3,
    model: str = "srgan",
    unsplit: bool = True,
    pinned: bool = False,
) -> dict[str, Any]:
    """The figures. Raises RuntimeError where a job does not come through."""
    picture = _picture(width, height)
    found: dict[str, list[dict[str, Any]]] = {"unsplit": [], "one": [], "two": []}
    bare: list[float] = []
    scale = card(model).scale
    with tempfile.TemporaryDirectory(prefix="enlarger-shards-") as folder:
        settings = Settings(
            data_dir=Path(folder),
            worker_device="cpu",
            worker_concurrency=2,
            torch_threads=1,
            log_level="warning",
            split_above_px=width * height // 2,
            shard_output_px=width * height * scale**2 // pieces,
        )
        with Stack(settings, port=free_port()) as stack:
            database = Database(stack.settings.sqlalchemy_url)
            working = _image_workers(database)
            helper = working[-1].id
            if pinned:
                for number, worker in enumerate(working):
                    _pin(psutil.Process(worker.pid), number)
            _made(stack, database, _picture(64, 64), model, "png")
            for _ in range(rounds):
                bare.append(_bare(model, 2, width, pinned) / _bare(model, 1, width, pinned))
                print(f"bare: {bare[-1]:.2f}", file=sys.stderr, flush=True)
                _drain(database, helper, drained=True)
                # A result in a form that cannot be joined is made as ever.
                if unsplit:
                    found["unsplit"].append(_made(stack, database, picture, model, "jpeg"))
                found["one"].append(_made(stack, database, picture, model, "png"))
                _drain(database, helper, drained=False)
                found["two"].append(_made(stack, database, picture, model, "png"))
            database.close()
    seconds = {name: median(each["seconds"] for each in made) for name, made in found.items() if made}
    return {
        "machine": machine(1),
        "size_px": [width, height],
        "model": model,
        "pinned": pinned,
        "bare": round(median(bare), 3),
        "speed_up": round(seconds["one"] / seconds["two"], 3),
        "of_bare": round(seconds["one"] / seconds["two"] / median(bare), 3),
        "speed_up_over_unsplit": round(seconds["unsplit"] / seconds["two"], 3) if unsplit else None,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "rounds": found,
    }


def _image_workers(database: Database) -> list[Worker]:
    with database.reading() as session:
        return list(session.scalars(select(Worker).where(Worker.kind == "images").order_by(Worker.id)))


def _pin(process: psutil.Process, number: int) -> None:
    """All threads that it and its children have, and those that they will start, on one core."""
    cores = sorted(os.sched_getaffinity(0))
    for each in (process, *process.children(recursive=True)):
        for thread in each.threads():
            os.sched_setaffinity(thread.id, {cores[number % len(cores)]})


def _drain(database: Database, worker_id: str, *, drained: bool) -> None:
    with database.transaction() as session:
        if drained:
            workers.drain(session, worker_id, now=clock(session))
        else:
            workers.resume(session, worker_id)
    if not drained:
        # It looks each second whether it may go on.
        threading.Event().wait(1.5)


def _made(stack: Stack, database: Database, picture: bytes, model: str, format: str) -> dict[str, Any]:
    """Hands the picture in, waits for its end, and tells where the time went."""
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    with httpx.Client(base_url=stack.url, headers=headers, timeout=90, trust_env=False) as client:
        answer = client.post("/v1/jobs", files={"image": ("p", picture)}, data={"model": model, "format": format})
        answer.raise_for_status()
        job_id = answer.json()["id"]
    # Its shards are there while it lives.
    seen: dict[int, Shard] = {}
    ends_at = time.monotonic() + LONGEST_SECONDS
    while True:
        with database.reading() as session:
            job = session.get_one(Job, job_id)
            seen |= {row.position: row for row in shards.of_job(session, job_id)}
        if job.finished_at is not None:
            break
        if time.monotonic() > ends_at:
            raise RuntimeError(f"{job_id} did not end")
        threading.Event().wait(LOOK_SECONDS)
    if job.state != "succeeded" or job.started_at is None:
        raise RuntimeError(f"{job_id} is {job.state}: {job.error_detail}")
    timings = job.timings or {}
    seconds = (job.finished_at - job.started_at).total_seconds()
    told = {name: round(timings[name], 3) for name in sorted(timings) if name.endswith("_seconds")}
    found: dict[str, Any] = {"seconds": round(seconds, 3), "timings": told}
    if seen:
        found["shards"] = len(seen)
        found["workers"] = _by_worker(seen.values(), job)
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def _by_worker(rows: Iterable[Shard], job: Job) -> list[dict[str, Any]]:
    assert job.started_at is not None
    assert job.finished_at is not None
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row.finished_at or job.finished_at):
        if row.worker_id is None or row.started_at is None:
            raise RuntimeError(f"shard {row.position} of {job.id} was not seen begun")
        # The last may have gone with its job before anybody looked: what the network took is then not known.
        ended_at = row.finished_at or job.finished_at
        timings = (row.facts or {}).get("timings", {})
        mine = found.setdefault(
            row.worker_id, {"positions": [], "network": 0.0, "encode": 0.0, "compare": 0.0, "shards": 0.0}
        )
        mine["positions"].append(row.position)
        mine["network"] += timings.get("upscale_seconds", 0.0)
        mine["encode"] += timings.get("encode_seconds", 0.0)
        mine["compare"] += timings.get("compare_seconds", 0.0)
        mine["shards"] += (ended_at - row.started_at).total_seconds()
        mine.setdefault("first", (row.started_at - job.started_at).total_seconds())
        mine["last"] = (ended_at - job.started_at).total_seconds()
    whole = (job.finished_at - job.started_at).total_seconds()
    return [
        {name: round(value, 3) if isinstance(value, float) else value for name, value in each.items()}
        | {"idle": round(whole - each["network"], 3)}
        for each in found.values()
    ]


def _bare(model: str, processes: int, width: int, pinned: bool) -> float:
    """Input px a second of so many processes at once, each with one thread and nothing but the network."""
    line = [sys.executable, "-m", "tests.benchmarks.shards", "--model", model, "--size", f"{width}x{BARE_HEIGHT_PX}"]
    line += ["--bare", str(BARE_SECONDS)]
    running = [
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for number, each in enumerate(running):
        assert each.stdout is not None
        each.stdout.readline()
        if pinned:
            _pin(psutil.Process(each.pid), number)
    speeds = []
    for each in running:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    for each in running:
        told, _ = each.communicate(timeout=LONGEST_SECONDS)
        speeds.append(float(told.split()[-1]))
    return sum(speeds)


def _bare_here(model: str, seconds: float, width: int) -> float:
    prepare_process(1)
    network = load(card(model), "cpu")
    network.warm_up()
    image = np.random.default_rng(0).integers(0, 256, (BARE_HEIGHT_PX, width, 3), np.uint8)
    for _ in enlarge(network, image, network.scale):
        pass
    print("ready", flush=True)
    sys.stdin.readline()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in enlarge(network, image, network.scale):
            pass
        done += width * BARE_HEIGHT_PX
    return done / (time.perf_counter() - began)


def _picture(width: int, height: int) -> bytes:
    """A PNG that looks as smooth as a photograph, and a little noisy."""
    chance = np.random.default_rng(3)
    small = Image.fromarray(chance.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), np.uint8))
    image = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    image = np.clip(image + chance.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
