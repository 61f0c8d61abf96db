"""A service in the middle of its day: what the operator's pages have to show, made by the verbs of the product."""

from __future__ import annotations

import io
import itertools
import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from PIL import Image

from shared import audit, deliveries, jobs, shards, workers
from shared.db import clock, new_id
from shared.errors import InvalidImage, OutOfMemory
from shared.jobs import Claim, JobInput, JobResult
from shared.models import Endpoint
from shared.workers import WorkerFacts
from tests.browser.conftest import Site
from tests.factories import options, retryable
from worker.enlarging import Progress
from worker.thumbnails import Thumbnails
from worker.trace import Trace

CAT = Path(__file__).resolve().parents[2] / "api" / "demo_photo" / "cat.png"
HOOK = "https://shop.example/hooks/enlarger"
WORKER = "images-box-4711-0a1b2c"


@dataclass(frozen=True)
class Day:
    operator: str
    shop: str
    done: str
    """A job that succeeded at its second attempt, with webhooks."""
    running: str
    shared: str
    """A large picture that three workers share."""
    failed: str
    waiting: str


def fill(site: Site, *, history: int = 150) -> Day:
    operator, _ = site.key("admin", name="operator")
    shop, _ = site.key("jobs", name="the shop")
    with site.database.transaction() as session:
        now = clock(session)
        chance = random.Random(3)
        for number in range(history):
            ended = now - timedelta(hours=23.5 * (number + chance.random()) / history)
            _one_of_many(session, shop, ended, chance)
        box = ("cpu.interactive", "cpu.bulk")
        facts = WorkerFacts(WORKER, "images", "box", 4711, box, "cpu", "AMD EPYC 9654")
        workers.enlist(session, facts, models_loaded=["srgan", "srresnet"], now=now - timedelta(hours=5))
        usage = {"cpu_share": 1.93, "memory_bytes": 1_430_000_000.0}
        workers.seen(session, WORKER, models_loaded=["srgan", "srresnet"], now=now, usage=usage)
        lost = WorkerFacts("images-gpu-1-99-ffffff", "images", "gpu-1", 99, ("gpu.interactive",), "gpu", "NVIDIA L4")
        workers.enlist(session, lost, models_loaded=["srgan"], now=now - timedelta(hours=9))
        gpu_usage = {
            "cpu_share": 0.4,
            "memory_bytes": 2_900_000_000.0,
            "gpu_share": 0.87,
            "vram_bytes": 9_300_000_000.0,
            "vram_total_bytes": 24_000_000_000.0,
        }
        workers.seen(session, lost.id, models_loaded=["srgan"], now=now - timedelta(minutes=4), usage=gpu_usage)
        for kind in ("chores", "relay"):
            workers.enlist(session, WorkerFacts(f"{kind}-box-1", kind, "box", 7, (), None), now=now)
        session.add(
            Endpoint(
                id=new_id("ep", now),
                owner_key_id=shop,
                url="https://archive.example/enlarged",
                events=["job.succeeded", "job.failed"],
                created_at=now - timedelta(days=12),
                disabled_at=now - timedelta(hours=3),
                disabled_reason="the receiver answered 410 Gone",
            )
        )
    failed = hand_in(site, shop, "poster-front.webp", model="srresnet", external_id="order-1041")
    site.fail(site.claim(failed), InvalidImage("The picture ends in the middle: 31 of 480 rows could be read."))
    done = hand_in(site, shop, "chelsea.png", classify=True, webhook_url=HOOK, external_id="order-1042")
    _fail_once(site, done)
    claim = _claim(site, done)
    _succeed(site, claim)
    with site.database.transaction() as session:
        now = clock(session)
        [first, *_] = deliveries.due(session, resend_after_seconds=60, now=now)
        for status in (503, 503):
            tried = deliveries.claim(session, first, lease_seconds=5, now=now)
            assert tried is not None
            deliveries.defer(
                session,
                tried,
                status=status,
                error=f"HTTP {status}",
                seconds=0.31,
                schedule_seconds=(0, 0, 300),
                retry_after_seconds=None,
                jitter=0,
                now=now,
            )
        audit.record(session, key_id=operator, key_name="operator", action="queue.pause", subject="cpu.bulk", now=now)
        jobs.pause_queue(session, "cpu.bulk", now=now)
    running = hand_in(site, shop, "harbour-1911.tif")
    site.progress(_claim(site, running), 4, 9)
    with site.database.transaction() as session:
        workers.working_on(session, WORKER, running, now=clock(session))
    shared = hand_in(site, shop, "mural.tif")
    _share(site, shared)
    waiting = hand_in(site, shop, "wall-size.jpg", queue="gpu.interactive", device="gpu", scale=8)
    return Day(operator, shop, done, running, shared, failed, waiting)


def _share(site: Site, job_id: str) -> None:
    """In 16 shards, of which some are made, some under way and one has cost a helper its memory."""
    claim, job = _claim(site, job_id), site.job(job_id)
    edges = [number * job.input_height // 48 for number in range(49)]
    bands = [[[0, y, job.input_width, end - y] * 2] for y, end in itertools.pairwise(edges)]
    with site.database.transaction() as session:
        now = clock(session)
        shards.begin(session, claim, [bands[first : first + 3] for first in range(0, 48, 3)], {})
        workers_at = {WORKER: 3, "images-box-2-98-1b2c3d": 2, "images-box-3-99-2c3d4e": 0}
        for worker_id, made in workers_at.items():
            below = None
            for number in range(made + 1):
                taken = shards.claim_to_help(
                    session, job_id, worker_id=worker_id, max_tries=3, lease_seconds=600, now=now, below=below
                )
                assert taken is not None
                below = taken.position
                if number < made:
                    shards.made(session, taken, key=taken.part_name, bytes=1, facts={}, now=now)
                else:
                    shards.progress(
                        session, taken, tiles_done=2, tiles_total=3, bands_done=2, lease_seconds=600, now=now
                    )
        failing = shards.claim_to_help(session, job_id, worker_id=WORKER, max_tries=3, lease_seconds=600, now=now)
        assert failing is not None
        shards.give_back(session, failing, OutOfMemory("A tile did not fit into 1 GB."))


def hand_in(site: Site, key_id: str, name: str, **asked: object) -> str:
    """A queued job for the cat, as the API makes it."""
    body = CAT.read_bytes()
    with Image.open(CAT) as image:
        width, height = image.size
    with site.database.reading() as session:
        now = clock(session)
    job_id = jobs.new_job_id(now)
    prefix = jobs.blob_prefix(job_id)
    picture = JobInput(job_id, prefix, f"{prefix}/input", width, height, "png", len(body), "ab" * 32, name)
    site.storage.put(picture.key, io.BytesIO(body), "image/png")
    with site.database.transaction() as session:
        jobs.submit(
            session,
            owner_key_id=key_id,
            options=options(**asked),
            picture=picture,
            max_attempts=3,
            max_queued_jobs=100_000,
            now=now,
        )
    return job_id


def _one_of_many(session: object, key_id: str, ended: datetime, chance: random.Random) -> None:
    seconds = chance.lognormvariate(1, 0.7)
    started = ended - timedelta(seconds=seconds)
    handed_in = started - timedelta(seconds=chance.lognormvariate(-0.5, 1))
    job_id = jobs.new_job_id(handed_in)
    prefix = jobs.blob_prefix(job_id)
    side = chance.choice((256, 400, 640))
    picture = JobInput(job_id, prefix, f"{prefix}/input", side, side, "png", side * side, "cd" * 32, "catalogue.png")
    asked = options(model=chance.choice(("srgan", "srgan", "srresnet")))
    jobs.submit(
        session,  # type: ignore[arg-type]
        owner_key_id=key_id,
        options=asked,
        picture=picture,
        max_attempts=3,
        max_queued_jobs=10**6,
        now=handed_in,
    )
    claim = jobs.claim(session, job_id, worker_id=WORKER, device="cpu", lease_seconds=20, now=started)  # type: ignore[arg-type]
    assert claim is not None
    if chance.random() < 0.06:
        error = OutOfMemory("A tile did not fit into 1 GB.")
        jobs.fail(session, claim, error, retry_delay_seconds=1, now=ended)  # type: ignore[arg-type]
        jobs.cancel(session, job_id, now=ended)  # type: ignore[arg-type]
    elif chance.random() < 0.05:
        jobs.fail(session, claim, InvalidImage("not a picture"), retry_delay_seconds=1, now=ended)  # type: ignore[arg-type]
    else:
        result = JobResult(f"{prefix}/result-1.png", side * 4, side * 4, side * side * 9, "ef" * 32)
        jobs.succeed(session, claim, result, now=ended)  # type: ignore[arg-type]


def _claim(site: Site, job_id: str) -> Claim:
    with site.database.transaction() as session:
        now = clock(session)
        claim = jobs.claim(session, job_id, worker_id=WORKER, device="cpu", lease_seconds=600, now=now)
    assert claim is not None
    job = site.job(job_id)
    with Thumbnails(site.storage, job.blob_prefix, claim.attempt) as thumbnails, Image.open(CAT) as image:
        thumbnails.begins(np.asarray(image.convert("RGB")), image.width * job.scale, image.height * job.scale)
    with site.database.transaction() as session:
        jobs.keep_trace(session, claim, a_trace(9, so_far=4 if job.attempt == 1 else None))
    return claim


def _fail_once(site: Site, job_id: str) -> None:
    claim = _claim(site, job_id)
    with site.database.transaction() as session:
        jobs.fail(session, claim, retryable(), retry_delay_seconds=0, now=clock(session))


def _succeed(site: Site, claim: Claim) -> None:
    site.succeed(claim)
    job = site.job(claim.job_id)
    with Thumbnails(site.storage, job.blob_prefix, claim.attempt) as thumbnails, Image.open(CAT) as image:
        large = image.convert("RGB").resize((image.width * 4, image.height * 4))
        thumbnails.begins(np.asarray(image.convert("RGB")), large.width, large.height)
        thumbnails.made(np.asarray(large))
        with thumbnails.storing_result():
            pass
    with site.database.transaction() as session:
        jobs.keep_trace(session, claim, a_trace(9))


def a_trace(bands: int, *, so_far: int | None = None) -> dict[str, object]:
    """Of an attempt whose middle did not fit into memory at once."""
    memory = iter(range(10**6))

    def held() -> tuple[int, int | None]:
        step = next(memory)
        return int(9e8 + 3e8 * (step % 7) / 7 + 2e7 * min(step, 20)), None

    trace = Trace(memory=held)
    at = 0.0
    for phase, seconds in (("fetch", 0.06), ("decode", 0.21), ("upscale", 0.0)):
        trace.begins(phase, at)
        at += seconds
    tiles = 3 * bands
    trace.progressed(Progress(0, tiles, 0, bands, None), at)
    chance = random.Random(11)
    for band in range(so_far or bands):
        if band == 5:
            tiles += 6
            trace.progressed(Progress(band * 3, tiles, band, bands, None), at + 0.2)
        at += (0.5 + 0.5 * chance.random()) * (2.4 if band == 5 else 1)
        trace.progressed(Progress(band * 3 + 3, tiles, band + 1, bands, None), at)
    if so_far is None:
        for phase, seconds in (("classify", 0.14), ("encode", 0.3), ("store", 0.09)):
            trace.begins(phase, at)
            at += seconds
    return trace.view(at)
