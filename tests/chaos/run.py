"""The runs: what is broken, in which order, under which load; and what a run came to, in figures."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from shared.models import JobState
from shared.queueing import IMAGE_QUEUES
from shared.settings import Settings
from tests.chaos.checker import Violation, check, recoveries
from tests.chaos.faults import inflict, kill_holder, kill_process, possible
from tests.chaos.history import History
from tests.chaos.proxy import MODES
from tests.chaos.world import SHORT_LIVES, World

Plan = dict[str, int]
"""How often each fault comes; `network` stands for every fault of that kind."""

SHORT: Plan = {
    "kill api process": 1,
    "kill image process": 3,
    "kill image worker": 1,
    "kill chores": 1,
    "kill relay": 1,
    "kill redis": 1,
    "kill s3": 1,
    "kill sql": 1,
    "stop image process": 2,
    "wipe redis": 2,
    "network": 1,
    "deploy images": 1,
    "deploy relay": 1,
}
LONG: Plan = {
    "kill api process": 8,
    "kill api": 4,
    "kill image process": 24,
    "kill image worker": 4,
    "kill chores": 6,
    "kill relay": 6,
    "kill redis": 8,
    "kill s3": 4,
    "kill sql": 20,
    "stop image process": 50,
    "stop redis": 2,
    "stop s3": 2,
    "wipe redis": 20,
    "network": 2,
    "deploy images": 6,
    "deploy api": 5,
    "deploy chores": 4,
    "deploy relay": 5,
}
KINDS = ("small",) * 6 + ("middle",) * 3 + ("long",)

HELP_TRIES = 5
"""So many pictures are handed in for one helper to be lost, at most: now and then one is made before help comes."""

WITHOUT_REDIS = tuple(mode for mode in MODES if mode != "pass")


def storm(world: World, plan: Plan, *, jobs: int, poison: int, longest_fault_seconds: float) -> None:
    """Everything in `plan`, in an order that the seed decides, while `jobs` pictures are handed in; then all is whole.

    Each fault comes with its share of the load, so that none passes over an idle service.
    """
    names = [name for name in possible(world) for _ in range(_times(plan, name))]
    world.chance.shuffle(names)
    load = ["poison"] * poison + [world.chance.choice(KINDS) for _ in range(jobs - poison)]
    world.chance.shuffle(load)
    for number, name in enumerate(names):
        share = load[number * jobs // len(names) : (number + 1) * jobs // len(names)]
        world.submit_each(share)
        inflict(world, name, seconds=world.chance.uniform(0.2, longest_fault_seconds))
        threading.Event().wait(world.chance.uniform(0, 0.5))


def submits_without_redis(world: World, *, count: int, modes: Sequence[str] = WITHOUT_REDIS) -> dict[str, list[float]]:
    """Seconds each of `count` submits took while Redis was broken in each way; every one of them must be accepted."""
    took: dict[str, list[float]] = {}
    for mode in modes:
        before = len(world.history.lines("submit"))
        world.proxies["redis"].set(mode)  # type: ignore[arg-type]
        try:
            for _ in range(count):
                world.submit("small")
        finally:
            world.proxies["redis"].set("pass")
        lines = world.history.lines("submit")[before:]
        took[mode] = [line["seconds"] for line in lines]
        world.history.record("measure", name=f"submit, Redis: {mode}", seconds=took[mode])
    return took


def lose_helpers(world: World, *, kills: int, stops: int) -> None:
    """Of pictures that several processes share, one that helps is killed, or sleeps for twice the lease, in the middle
    of a shard. Hands in a picture for each, once nothing else waits: helping is for whoever is idle. For a world with
    SHARED settings."""
    world.wait_for_customers()
    for kind in ["kill helper"] * kills + ["stop helper"] * stops:
        for _ in range(HELP_TRIES):
            world.rest()
            # Messages of jobs that have ended: help would wait behind them.
            world.wait_until(lambda: not any(world.redis.llen(queue) for queue in IMAGE_QUEUES), seconds=240)
            if _lost_a_helper(world, kind):
                break


def _lost_a_helper(world: World, kind: str) -> bool:
    """False where the picture was made before anybody helped."""
    job_id = world.submit("wide")
    found: list[int] = []

    def is_helped() -> bool:
        found.extend(world.helpers(job_id))
        return bool(found) or world.states([job_id])[JobState.SUCCEEDED] > 0

    world.wait_until(is_helped, seconds=240)
    killed = int(bool(found) and kind.startswith("kill"))
    if killed:
        kill_process(found[0])
    elif found:
        world.in_background(partial(world.sleep, found[0], 2 * world.settings.lease_seconds))
    world.history.record("fault", kind=kind, killed=killed, helped=bool(found), job=job_id)
    world.tell(f"{kind} of {job_id}{'' if found else ': nobody helped'}")
    return bool(found)


def kill_in_mid_job(world: World, *, kills: int) -> None:
    """Kills processes that are in the middle of long jobs, most jobs twice, and waits for each next attempt.

    Half of the image processes at most are without life at a time: recovery is promised with capacity idle.
    """
    slots = max(1, world.settings.worker_concurrency // 2)
    left = threading.Semaphore(kills)

    def slot() -> None:
        while True:
            job_id = world.submit("endless")
            for attempt in (1, 2):
                if not left.acquire(blocking=False):
                    world.http.post(f"/v1/jobs/{job_id}/cancel")
                    return
                holder = _holder(world, job_id, attempt)
                threading.Event().wait(world.chance.uniform(0, 2))
                kill_holder(world, holder)
                world.tell(f"killed the process that had attempt {attempt} of {job_id}")
            _holder(world, job_id, 3)
            world.http.post(f"/v1/jobs/{job_id}/cancel")

    with ThreadPoolExecutor(slots) as threads:
        for ended in [threads.submit(slot) for _ in range(slots)]:
            ended.result()


def _holder(world: World, job_id: str, attempt: int) -> tuple[int, str, int]:
    ends_at = time.monotonic() + 240
    while time.monotonic() < ends_at:
        for holder in world.holders(after=0.02):
            if holder[1:] == (job_id, attempt):
                return holder
        threading.Event().wait(0.05)
    raise TimeoutError(f"attempt {attempt} of {job_id} does not come")


def default_lives() -> dict[str, Any]:
    """The product's own numbers for what SHORT_LIVES shortens."""
    return {name: Settings.model_fields[name].default for name in SHORT_LIVES}


# --- controls: what is switched off must be missed ------------------------------------------------------------------


def without_relay(folder: Path, *, seed: int, tell: Callable[[str], None] = lambda _: None) -> list[Violation]:
    """One process is killed in mid-job and Redis is wiped, and nobody rescues or sends again."""
    with World(folder, seed=seed, image_processes=1, receiver_faults=0, tell=tell) as world:
        world.stack.hold("relay")
        job_id = world.submit("long")
        holder = _holder(world, job_id, 1)
        waiting = [world.submit("small") for _ in range(4)]
        world.redis.flushall()
        kill_holder(world, holder)
        assert waiting
        # Longer than a rescue would take, and than the relay would wait before it sends again.
        world.settle(seconds=2 * world.settings.lease_seconds + world.settings.resend_after_seconds)
        return check(world.history)


def without_fence(folder: Path, *, seed: int, tell: Callable[[str], None] = lambda _: None) -> list[Violation]:
    """One process sleeps in mid-job until another has done its work, then wakes up and may write."""
    with World(folder, seed=seed, fence=False, receiver_faults=0, tell=tell) as world:
        job_id = world.submit("long")
        pid, _, _ = _holder(world, job_id, 1)
        world.stop_until(pid, lambda: world.open_jobs() == 0, seconds=120)
        # It goes on where it was: the rest of its tiles, then its own success.
        world.wait_until_idle(pid, seconds=60)
        world.settle()
        return check(world.history)


# --- figures --------------------------------------------------------------------------------------------------------


def figures(history: History) -> dict[str, Any]:
    """What a history amounts to, as numbers."""
    faults = history.lines("fault")
    answers = Counter(str(line["status"] or "no answer") for line in history.lines("submit"))
    attempts = Counter(str(line["outcome"]) for line in history.lines("attempt"))
    restarts = recoveries(history)
    made: dict[str, Any] = {
        "jobs": dict(Counter(line["state"] for line in history.lines("job"))),
        "answers": dict(answers),
        "attempts": dict(attempts),
        "kills": sum(line.get("killed", 0) for line in faults),
        "kills_in_mid_job": len(history.lines("kill")),
        "poisonous": len({line["key"] for line in history.lines("submit") if line["picture"] == "poison"}),
        "shards_made": sum(line["new_made"] for line in history.lines("shard")),
        "shards_taken_again": sum(
            (line["new_number"] or 0) > 1 and not line["new_made"] for line in history.lines("shard")
        ),
        "helpers_lost": sum(line["helped"] for line in faults if line["kind"].endswith(" helper")),
        "stops_in_mid_job": sum(line["kind"] == "stop image process" and line["stopped"] for line in faults),
        "wipes": sum(line.get("wiped", 0) for line in faults),
        "deploys": sum(line["kind"].startswith("deploy") for line in faults),
        "faults": dict(sorted(Counter(line["kind"] for line in faults).items())),
        "events": dict(Counter(line["state"] for line in history.lines("delivery"))),
        "webhook_calls": len(history.lines("heard")),
        "webhook_calls_refused": sum(line["answered"] >= 300 for line in history.lines("heard")),
        "longest_answer_seconds": max((line["seconds"] for line in history.lines("submit")), default=0.0),
        "most_copies_of_a_message": max((line["published_count"] for line in history.lines("job")), default=0),
    }
    if restarts:
        made["recovery_seconds"] = spread(restarts)
    for line in history.lines("measure"):
        made.setdefault("measures", {})[line["name"]] = spread(line["seconds"])
    return made


def spread(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        # The value that 99 of 100 do not exceed; of fewer than 100, the largest.
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "max": round(ordered[-1], 3),
    }


def _times(plan: Plan, name: str) -> int:
    if name in plan:
        return plan[name]
    return plan.get("network", 0) if name.split()[0] in MODES else 0
