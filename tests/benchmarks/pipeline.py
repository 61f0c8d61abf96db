"""How busy the network is over a queue of mixed pictures, and what a job costs beside network and codec.

    python -m tests.benchmarks.pipeline [--jobs 50] [--model srgan] [--torch-threads 0] [--json FILE]

A whole service on this machine: HTTP, SQL, Redis, S3, one image worker. All pictures are handed in as fast as the API
takes them; what is read afterwards is what the attempts have written down, in the database's clock:

    busy       of the time from the first claim to the last success, the share in which the network ran
    overhead   of one job, from its claim to its network's start and from its network's end to success, what was no
               codec (decode; encoding that the network did not cover): SQL, storage, scratch files, the sandbox's
               hand-over, thumbnails
    between    of one job, while its network runs, what was neither network nor waiting for the encoder: mostly where
               progress is written
    turn       from one job's success to the next one's claim; below 0 by so much as the next was claimed before, since
               the last is encoded, stored and recorded beside it
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image
from sqlalchemy import select

from shared.db import Database
from shared.models import Attempt, Job
from shared.servers import free_port
from shared.settings import Settings
from shared.stack import Stack

LONGEST_SECONDS = 3600.0
SIDES_PX = ((256, 256), (320, 240), (200, 300), (400, 300), (128, 192))
KINDS = (("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("PNG", "RGBA"), ("JPEG", "L"), ("TIFF", "RGB"))
RESULTS = ("png", "jpeg", "png", "webp", "jpeg", "tiff")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how busy the network is over a queue of mixed pictures.")
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--model", default="srgan")
    parser.add_argument("--torch-threads", type=int, default=0, help="of the network; 0 is one for each core")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    asked = parser.parse_args()
    measured = measure(jobs=asked.jobs, model=asked.model, torch_threads=asked.torch_threads)
    print(json.dumps(measured, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(measured, indent=1) + "\n")


def measure(*, jobs: int = 50, model: str = "srgan", torch_threads: int = 0) -> dict[str, Any]:
    """The figures: `busy` (0 to 1), milliseconds at the median and at p95, and the phases' medians.

    Raises RuntimeError where a job does not come through.
    """
    pictures = [_picture(number) for number in range(jobs)]
    with tempfile.TemporaryDirectory(prefix="enlarger-pipeline-") as folder:
        settings = Settings(
            data_dir=Path(folder), worker_device="cpu", torch_threads=torch_threads, log_level="warning"
        )
        with Stack(settings, port=free_port()) as stack:
            _made(stack, [pictures[0]] * 2, model)
            began_at = _made(stack, pictures, model)
            database = Database(stack.settings.sqlalchemy_url)
            with database.reading() as session:
                rows = session.execute(
                    select(Job, Attempt)
                    .join(Attempt, Attempt.job_id == Job.id)
                    .where(Job.created_at >= began_at)
                    .order_by(Attempt.started_at)
                ).all()
            database.close()
    return {
        "jobs": jobs,
        "model": model,
        "torch_threads": torch_threads,
        **_figures([(row[0], row[1]) for row in rows]),
    }


def _figures(rows: list[tuple[Job, Attempt]]) -> dict[str, Any]:
    networks, befores, afters, betweens, turns = [], [], [], [], []
    last_end: datetime | None = None
    for job, attempt in rows:
        if job.state != "succeeded" or attempt.finished_at is None or attempt.trace is None:
            raise RuntimeError(f"{job.id} is {job.state}: {job.error_detail}")
        timings = job.timings or {}
        whole = (attempt.finished_at - attempt.started_at).total_seconds()
        begins = dict(reversed(attempt.trace["phases"]))
        networks.append(timings["upscale_seconds"])
        befores.append(begins["upscale"] - timings["decode_seconds"])
        # Phases are counted from the claim's end: what is left of the claim is in here.
        afters.append(whole - begins["store"])
        waits = timings["encode_seconds"] - (begins["store"] - begins["encode"])
        betweens.append(begins["encode"] - begins["upscale"] - networks[-1] - waits)
        if last_end is not None:
            turns.append((attempt.started_at - last_end).total_seconds())
        last_end = attempt.finished_at
    assert last_end is not None
    overheads = [before + after for before, after in zip(befores, afters, strict=True)]
    phases = {name for job, _ in rows for name in job.timings or {} if name.endswith("_seconds")} - {"queued_seconds"}
    return {
        "busy": round(sum(networks) / (last_end - rows[0][1].started_at).total_seconds(), 4),
        "network_p50_ms": _ms(networks),
        "overhead_p50_ms": _ms(overheads),
        "overhead_p95_ms": _ms(overheads, 0.95),
        "claim_to_network_p50_ms": _ms(befores),
        "network_to_success_p50_ms": _ms(afters),
        "between_p50_ms": _ms(betweens),
        "turn_p50_ms": _ms(turns),
        "phases_p50_ms": {
            name.removesuffix("_seconds"): _ms([(job.timings or {}).get(name, 0.0) for job, _ in rows])
            for name in sorted(phases)
        },
    }


def _ms(seconds: list[float], share: float = 0.5) -> float | None:
    if not seconds:
        return None
    value = median(seconds) if share == 0.5 else sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]
    return round(1000 * value, 1)


def _made(stack: Stack, pictures: list[tuple[bytes, str]], model: str) -> datetime:
    """Hands the pictures in and waits until all have ended. Returns when the first row was made."""
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    with httpx.Client(base_url=stack.url, headers=headers, timeout=90, trust_env=False) as client:
        views = []
        for picture, format in pictures:
            answer = client.post(
                "/v1/jobs", files={"image": ("picture", picture)}, data={"model": model, "format": format}
            )
            answer.raise_for_status()
            views.append(answer.json())
        ends_at = time.monotonic() + LONGEST_SECONDS
        for view in views:
            while client.get(f"/v1/jobs/{view['id']}").json()["finished_at"] is None:
                if time.monotonic() > ends_at:
                    raise RuntimeError(f"{view['id']} did not end")
                client.get(f"/v1/jobs/{view['id']}", headers={"Prefer": "wait=30"})
    return datetime.fromisoformat(views[0]["created_at"])


def _picture(number: int) -> tuple[bytes, str]:
    """(a picture file, the format of its result), another for each number."""
    chance = np.random.default_rng(number)
    width, height = SIDES_PX[number % len(SIDES_PX)]
    format, mode = KINDS[number % len(KINDS)]
    small = Image.fromarray(chance.integers(0, 256, (9, 12, 4), dtype=np.uint8), "RGBA")
    image = small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue(), RESULTS[(number // 2) % len(RESULTS)]


if __name__ == "__main__":
    main()
