"""No file that anybody hands in crashes or stalls the service (G13), and none gets an answer that is not ours.

Files go through the real HTTP API into real storage, are read in real sandboxes and worked on by the workers' own code;
only the network is one that takes no time. `make test` sends some hundred mutants; `make fuzz` sends FUZZ_MUTANTS of
them (5,000) and prints what became of all.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from sqlalchemy import func, select

from shared import keys
from shared.db import Database, clock
from shared.models import TERMINAL_STATES, Job, JobState
from shared.pictures import FORMATS, inspect_in
from shared.settings import Settings
from shared.storage import Storage
from shared.workers import WorkerFacts, enlist
from tests.api.conftest import running, served
from tests.conftest import wait_until
from tests.factories import a_png
from tests.mutants import bombs, mutants
from tests.worker import a_network
from tests.worker.codec.test_decode import EXPECTED_DISAGREEMENTS
from worker.codec.sandboxed import Sandboxed
from worker.enlarging import Engine
from worker.execute import Executor

MUTANTS = int(os.environ.get("FUZZ_MUTANTS", "200"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
LONGEST_ANSWER_SECONDS = 10
MAX_INPUT_PX = 4_000_000
# What a file may be refused with, by status; and what a job may fail with that was taken.
REFUSALS = {
    ("invalid-image", 422),
    ("unsupported-format", 415),
    ("input-too-large", 413),
    ("output-too-large", 422),
    ("format-cannot-hold-size", 422),
}
FAILURES = {"invalid-image"}
# Of the child's 64 B/px and 256 MB beyond the warm process, for the largest picture taken here.
MOST_PEAK_BYTES = 256 * 2**20 + 64 * MAX_INPUT_PX + 100 * 2**20


@dataclass
class Became:
    """What became of one file."""

    name: str
    status: int
    code: str
    seconds: float
    job_id: str | None = None
    answer: str = ""


@dataclass
class Harness:
    """The service, and a customer who hands in files."""

    url: str
    secret: str
    database: Database
    decoders: list[Sandboxed]
    peaks: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def post(self, files: Iterable[tuple[str, bytes]]) -> list[Became]:
        """Hands all of them in, some at once, and waits until every job has ended."""
        with (
            httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.secret}"}, timeout=60) as http,
            ThreadPoolExecutor(4) as customers,
        ):
            became = list(customers.map(lambda file: self._post_one(http, *file), files))
        wait_until(lambda: self.waiting() == 0 or self.broken, seconds=60 + 2 * len(became), what="every job to end")
        assert self.broken == []
        with self.database.reading() as session:
            ended = {job.id: job for job in session.scalars(select(Job))}
        for one in became:
            if one.job_id is not None:
                job = ended[one.job_id]
                one.code = "succeeded" if job.state == JobState.SUCCEEDED else f"{job.state}: {job.error_code}"
        return became

    def _post_one(self, http: httpx.Client, name: str, content: bytes) -> Became:
        began = time.monotonic()
        answer = http.post(
            "/v1/jobs", files={"image": (name, content)}, data={"format": "jpeg", "quality": "50", "scale": "2"}
        )
        seconds = time.monotonic() - began
        body = answer.json()
        kind = answer.headers["content-type"]
        if answer.status_code == 202:
            return Became(name, 202, "", seconds, body["id"])
        assert kind == "application/problem+json", (name, kind)
        return Became(name, answer.status_code, body["code"], seconds, answer=answer.text)

    def waiting(self) -> int:
        with self.database.reading() as session:
            return session.scalar(select(func.count()).where(Job.state.not_in(TERMINAL_STATES))) or 0

    def work(self, executor: Executor, decoder: Sandboxed, stopping: threading.Event) -> None:
        """A worker: takes what is queued until it is told to stop. Anything it raises is a dead worker."""
        try:
            while not stopping.is_set():
                with self.database.reading() as session:
                    waiting = session.scalars(select(Job.id).where(Job.state == JobState.QUEUED).limit(20)).all()
                for job_id in waiting:
                    executor.run(job_id)
                    if decoder.sandbox.last_spent is not None:
                        self.peaks.append(decoder.sandbox.last_spent.peak_bytes)
                stopping.wait(0 if waiting else 0.02)
        except BaseException as error:
            self.broken.append(repr(error))
            raise

    def check(self, became: list[Became]) -> Counter[str]:
        """Every promise about every file; returns how many came to what."""
        worst = max(became, key=lambda one: one.seconds)
        assert worst.seconds < LONGEST_ANSWER_SECONDS, worst
        for one in became:
            if one.job_id is None:
                assert (one.code, one.status) in REFUSALS, one
                assert not re.search(r"Traceback|/site-packages/|0x[0-9a-f]{6,}", one.answer), one
            else:
                assert one.code == "succeeded" or one.code.removeprefix("failed: ") in FAILURES, one
        assert max(self.peaks, default=0) < MOST_PEAK_BYTES
        assert len({decoder.sandbox.pid for decoder in self.decoders}) == len(self.decoders)
        return Counter(one.code for one in became)


@pytest.fixture
def few_words() -> Iterator[None]:
    """Logs errors only: there would be thousands of lines, each about a file that is broken on purpose."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.configure(**before)


@pytest.fixture
def harness(
    few_words: None,
    settings: Settings,
    sqlite_database: Database,
    storage: Storage,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Harness]:
    a_network.install(monkeypatch)
    requests = logging.getLogger("werkzeug")
    monkeypatch.setattr(requests, "level", logging.ERROR)
    roomy = settings.model_copy(
        update={
            "max_input_px": MAX_INPUT_PX,
            "max_queued_jobs_per_key": 100_000,
            "rate_limit_per_minute": 1_000_000,
            "retry_delay_seconds": 0.0,
        }
    )
    with running(roomy) as api, served(api.app) as url:
        # As a process of the service has it: warm before the first picture comes.
        inspect_in(api.context.sandbox, io.BytesIO(a_png()), max_px=MAX_INPUT_PX)
        # Ended before anybody works: with SQLite one writes at a time.
        with sqlite_database.transaction() as session:
            _, secret = keys.create(session, name="fuzz", scopes=["jobs"], now=datetime.now(UTC))
        decoders = [Sandboxed(MAX_INPUT_PX) for _ in range(2)]
        made = Harness(url, secret, sqlite_database, decoders)
        with working(made, roomy, storage):
            yield made


@contextmanager
def working(harness: Harness, settings: Settings, storage: Storage) -> Iterator[None]:
    stopping = threading.Event()
    threads = []
    for number, decoder in enumerate(harness.decoders):
        facts = WorkerFacts(f"images-{number}", "images", "host", 1, ("cpu.interactive", "cpu.bulk"), "cpu")
        with harness.database.transaction() as session:
            enlist(session, facts, now=clock(session))
        engine = Engine.of(settings, "cpu", decoder)
        executor = Executor(harness.database, storage, settings, {"cpu": engine}, facts, decoder)
        threads.append(threading.Thread(target=harness.work, args=(executor, decoder, stopping)))
        threads[-1].start()
    pids = []
    try:
        yield
        pids = [decoder.sandbox.pid for decoder in harness.decoders]
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        for decoder in harness.decoders:
            decoder.close()
    assert all(pids), "a warm process is gone"


def test_no_mutant_crashes_or_stalls_the_service(harness: Harness) -> None:
    batch = list(mutants(MUTANTS, SEED))
    began = time.monotonic()
    became: list[Became] = []
    # In portions, so that a queue of thousands does not decide how long the last one waits.
    for start in range(0, len(batch), 500):
        became += harness.post(batch[start : start + 500])
    counts = harness.check(became)
    assert counts["succeeded"] > 0
    assert counts["failed: invalid-image"] > 0, "no mutant came as far as a worker and was refused there"
    assert counts["invalid-image"] > 0
    tell(harness, f"{MUTANTS:,} mutants, seed {SEED}", became, counts, time.monotonic() - began)


def test_no_bomb_goes_off(harness: Harness) -> None:
    began = time.monotonic()
    became = harness.post(bombs().items())
    counts = harness.check(became)
    assert counts["input-too-large"] >= 20
    tell(harness, f"{len(became)} bombs", became, counts, time.monotonic() - began)


def test_every_sample_gets_the_answer_that_the_record_of_pillow_asks_for(samples: Path, harness: Harness) -> None:
    rows: dict[str, dict[str, str]] = {}
    files: list[tuple[str, bytes]] = []
    for folder in ("badinput", "oddinput"):
        root = samples / "images" / folder
        with (root / "DECODE.csv").open() as record:
            for row in csv.DictReader(record):
                name = f"{folder}/{row['file']}"
                rows[name] = row
                files.append((name, (root / row["file"]).read_bytes()))
    began = time.monotonic()
    became = harness.post(files)
    counts = harness.check(became)
    offered = {name for format in FORMATS for name in format.pillow_names}
    wrong = []
    for one in became:
        row = rows[one.name]
        if row["format"] and row["format"] not in offered:
            expected = {"unsupported-format"}
        elif row["w"] and int(row["w"]) * int(row["h"]) > MAX_INPUT_PX:
            expected = {"input-too-large"}
        elif any(re.fullmatch(n, row["file"]) and re.fullmatch(r, row["result"]) for n, r, _ in EXPECTED_DISAGREEMENTS):
            expected = {"succeeded", "invalid-image", "failed: invalid-image"}
        elif row["result"] == "ok":
            # JPEG holds 65,500 px a side at most.
            expected = {"succeeded"} if max(int(row["w"]), int(row["h"])) <= 32_750 else {"format-cannot-hold-size"}
        else:
            # Broken, and perhaps refused for something else that its header says before that is found out.
            refused_first = {"unsupported-format", "input-too-large", "format-cannot-hold-size"}
            expected = {"invalid-image", "failed: invalid-image", *refused_first}
        if one.code not in expected:
            wrong.append(f"{one.name}: {one.code}, expected {sorted(expected)}; the record says {row['result']!r}")
    assert wrong == [], "\n".join(wrong)
    tell(harness, f"{len(became)} sample files", became, counts, time.monotonic() - began)


def tell(harness: Harness, what: str, became: list[Became], counts: Counter[str], seconds: float) -> None:
    """Under `make fuzz`, what the run came to: figures for the documents."""
    slowest = max(became, key=lambda one: one.seconds)
    said: dict[str, Any] = {
        "files": len(became),
        **dict(sorted(counts.items())),
        "5xx": sum(one.status >= 500 for one in became),
        "dead workers": len(harness.broken),
        "slowest answer": f"{slowest.seconds:.2f} s ({slowest.name})",
        "peak of a child": f"{max(harness.peaks, default=0) / 2**20:.0f} MB",
        "took": f"{seconds:.0f} s",
    }
    sys.stdout.write(f"\n{what}\n" + "".join(f"  {name:<24} {value}\n" for name, value in said.items()))
