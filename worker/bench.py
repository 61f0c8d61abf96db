"""How much of a job's time is the network's: a whole job against the bare call, in turns on one machine.

The bare call is the fastest plain form of the network in torch: BatchNorm folded, channels_last, one call for the whole
picture, nothing around it. The job goes the customer's way: an HTTP request, storage, queue, worker, storage.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Callable
from datetime import datetime
from statistics import median
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.calibration import processor
from shared.catalog import DEFAULT_MODEL, card
from worker.networks import Network, load
from worker.upscale import enlarge, plan_work, prepare_process

LONGEST_JOB_SECONDS = 600.0
TILED_SIZES = ((512, 512), (1024, 768), (4000, 3000))
"""Pictures whose plan is shown: at this machine's speed they are cut."""


def measure(
    url: str, api_key: str, *, rounds: int, side_px: int, on_round: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Times, in each of `rounds`, the bare call, the engine alone and one job of the service at `url`, in turns.

    `seconds` are medians; `over_bare` is the median of the rounds' ratios. A job's seconds are its POST's plus those
    from its row's creation to its result's being stored and recorded: every wait is counted, some of it twice. All run
    on the CPU, also where there is a GPU: of one device the ratios say something. The service should have one image
    worker and nothing else to do. Raises httpx.HTTPError, or RuntimeError where a job does not come through.
    """
    threads = prepare_process(0)
    network = load(card(DEFAULT_MODEL), "cpu")
    image = _scene(side_px)
    bare, engine = _bare(network, image), _engine(network, image)
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    seconds: dict[str, list[float]] = {"bare": [], "engine": [], "job": []}
    phases: list[dict[str, float]] = []
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=90, trust_env=False
    ) as client:
        bare()
        engine()
        _job(client, png.getvalue())
        for done in range(1, rounds + 1):
            for name, form in (("bare", bare), ("engine", engine)):
                started = time.perf_counter()
                form()
                seconds[name].append(time.perf_counter() - started)
            job_seconds, timings = _job(client, png.getvalue())
            seconds["job"].append(job_seconds)
            phases.append(timings)
            on_round(done)
    what = {
        "bare": "the bare network call",
        "engine": "the engine: tiles, rounding to 8 bits",
        "job": "a job, from submit to stored result",
    }
    measured: dict[str, Any] = {
        name: {
            "what": what[name],
            "seconds": round(median(times), 4),
            "over_bare": round(median(a / b for a, b in zip(times, seconds["bare"], strict=True)), 4),
            "all_seconds": [round(value, 4) for value in times],
        }
        for name, times in seconds.items()
    }
    names = [name for name in phases[0] if name.endswith("_seconds")]
    measured["job"]["phases_seconds"] = {
        name.removesuffix("_seconds"): round(median(timings.get(name, 0.0) for timings in phases), 4) for name in names
    }
    return {
        "model": DEFAULT_MODEL,
        "side_px": side_px,
        "rounds": rounds,
        "tiles": plan_work(network, side_px, side_px, network.scale).tile_count,
        # Multiply-adds done over needed: what the halos cost.
        "waste": {
            f"{width}x{height}": round(plan_work(network, width, height, network.scale).waste, 3)
            for width, height in TILED_SIZES
        },
        **measured,
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "threads": threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.release()}",
        },
    }


def _scene(side_px: int) -> NDArray[np.uint8]:
    """A made picture, (side, side, 3) uint8: soft shapes and some noise, so that PNG works about as hard as usual."""
    y, x = np.mgrid[:side_px, :side_px] / side_px
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(12 * x * y)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    return np.clip(128 + 90 * waves + noise, 0, 255).astype(np.uint8)


def _bare(network: Network, image: NDArray[np.uint8]) -> Callable[[], object]:
    given = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]
    given = given.contiguous(memory_format=torch.channels_last)

    def call() -> object:
        with torch.inference_mode():
            return network.module(given)

    return call


def _engine(network: Network, image: NDArray[np.uint8]) -> Callable[[], object]:
    return lambda: list(enlarge(network, image, network.scale, dtype=np.uint8))


def _job(client: httpx.Client, png: bytes) -> tuple[float, dict[str, float]]:
    """(seconds, timings) of one job."""
    started = time.perf_counter()
    answer = client.post("/v1/jobs", files={"image": ("bench.png", png, "image/png")}, data={"device": "cpu"})
    post_seconds = time.perf_counter() - started
    answer.raise_for_status()
    ends_at = time.monotonic() + LONGEST_JOB_SECONDS
    while (job := answer.json())["finished_at"] is None and time.monotonic() < ends_at:
        answer = client.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=60"})
        answer.raise_for_status()
    if job["status"] != "succeeded":
        raise RuntimeError(f"the job is {job['status']}: {job['error']}")
    created_at, finished_at = (datetime.fromisoformat(job[name]) for name in ("created_at", "finished_at"))
    return post_seconds + (finished_at - created_at).total_seconds(), job["timings"]
