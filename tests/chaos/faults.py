"""Everything that is broken on purpose, by name. Each fault heals what it has broken before it returns.

A fault is told the world and how long to last; what it did is a line of the history.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import redis

from shared.stack import PROCESSES
from tests.chaos.proxy import MODES
from tests.chaos.world import World, stopped

Fault = Callable[[World, float], dict[str, Any]]
"""(world, seconds it lasts) -> facts for its line."""

WAIT_FOR_A_JOB_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 60.0
DEPLOY_SECONDS = 60.0
"""For a process told to stop; the product kills what it started after 30 s by itself."""


def inflict(world: World, name: str, *, seconds: float) -> None:
    """Does it and records it. The line tells when it began and how long it took."""
    began = time.monotonic()
    at = datetime.now(UTC)
    facts = FAULTS[name](world, seconds)
    world.history.record(
        "fault", **{"kind": name, "moment": at, "seconds": round(time.monotonic() - began, 3), **facts}
    )
    world.tell(f"{name} ({time.monotonic() - began:.1f} s) {facts or ''}")


# --- SIGKILL --------------------------------------------------------------------------------------------------------


def kill_image_process(world: World, _seconds: float) -> dict[str, Any]:
    """A process in the middle of a job, where there is one within some seconds; else an idle one."""
    began = time.monotonic()
    while time.monotonic() - began < LONGEST_WAIT_SECONDS:
        if holders := world.holders():
            return kill_holder(world, world.chance.choice(holders))
        if time.monotonic() - began > WAIT_FOR_A_JOB_SECONDS and (pids := world.image_processes()):
            kill_process(world.chance.choice(pids))
            return {"killed": 1}
        threading.Event().wait(0.02)
    return {"killed": 0}


def kill_holder(world: World, holder: tuple[int, str, int]) -> dict[str, Any]:
    pid, job_id, attempt = holder
    at = datetime.now(UTC)
    kill_process(pid)
    world.history.record("kill", kind="image process", job=job_id, attempt=attempt, moment=at)
    return {"killed": 1}


def kill_image_worker(world: World, _seconds: float) -> dict[str, Any]:
    """The main process and with it all of its children, as when a container is gone."""
    holders = world.holders()
    at = datetime.now(UTC)
    kill_process(world.stack.process("images").pid)
    for _, job_id, attempt in holders:
        world.history.record("kill", kind="image worker", job=job_id, attempt=attempt, moment=at)
    return {"killed": 1}


def kill_api_process(world: World, _seconds: float) -> dict[str, Any]:
    """One of gunicorn's workers, with the requests that it is answering."""
    world.wait_until(lambda: _children(world.stack.process("api").pid), seconds=LONGEST_WAIT_SECONDS)
    kill_process(world.chance.choice(_children(world.stack.process("api").pid)))
    return {"killed": 1}


def kill_whole(name: str) -> Fault:
    def kill(world: World, _seconds: float) -> dict[str, Any]:
        world.stack.hold(name)
        world.stack.release(name)
        return {"killed": 1}

    return kill


def kill_server(name: str) -> Fault:
    def kill(world: World, seconds: float) -> dict[str, Any]:
        world.servers[name].kill()
        threading.Event().wait(seconds)
        world.restart(name)
        return {"killed": 1}

    return kill


# --- SIGSTOP --------------------------------------------------------------------------------------------------------


def stop_image_process(world: World, _seconds: float) -> dict[str, Any]:
    """In the middle of a job, for twice the lease, in a thread of its own: the others go on meanwhile, and so does the
    chaos."""
    began = time.monotonic()
    while time.monotonic() - began < WAIT_FOR_A_JOB_SECONDS:
        if holders := [holder for holder in world.holders() if holder[0] not in world.sleeping]:
            pid, job_id, attempt = world.chance.choice(holders)
            world.in_background(partial(world.sleep, pid, 2 * world.settings.lease_seconds))
            return {"stopped": 1, "job": job_id, "attempt": attempt}
        threading.Event().wait(0.02)
    return {"stopped": 0}


def stop_server(name: str) -> Fault:
    def stop(world: World, seconds: float) -> dict[str, Any]:
        pid = world.servers[name].process.pid
        with stopped(pid):
            threading.Event().wait(seconds)
        return {"stopped": 1}

    return stop


# --- the network ----------------------------------------------------------------------------------------------------


def network(name: str, mode: Any) -> Fault:
    def spoil(world: World, seconds: float) -> dict[str, Any]:
        world.proxies[name].set(mode)
        threading.Event().wait(seconds)
        world.proxies[name].set("pass")
        return {}

    return spoil


# --- Redis loses all ------------------------------------------------------------------------------------------------


def wipe_redis(world: World, _seconds: float) -> dict[str, Any]:
    with suppress(redis.RedisError):
        world.redis.flushall()
        return {"wiped": 1}
    return {"wiped": 0}


# --- deploys --------------------------------------------------------------------------------------------------------


def deploy(name: str) -> Fault:
    """SIGTERM, as a deploy sends it; the supervisor starts the successor."""

    def replace(world: World, _seconds: float) -> dict[str, Any]:
        process = world.stack.process(name)
        forced_before = world.forced_stops()
        process.send_signal(signal.SIGTERM)
        status: int | str = process.wait(DEPLOY_SECONDS)
        if world.forced_stops() > forced_before:
            status = "its processes were killed by the grace time"
        return {"status": status}

    return replace


FAULTS: dict[str, Fault] = {
    "kill image process": kill_image_process,
    "kill image worker": kill_image_worker,
    "kill api process": kill_api_process,
    **{f"kill {name}": kill_whole(name) for name in PROCESSES if name != "images"},
    **{f"kill {name}": kill_server(name) for name in ("redis", "s3", "sql")},
    "stop image process": stop_image_process,
    **{f"stop {name}": stop_server(name) for name in ("redis", "s3")},
    **{f"{mode} {name}": network(name, mode) for name in ("redis", "s3", "sql") for mode in MODES if mode != "pass"},
    "wipe redis": wipe_redis,
    **{f"deploy {name}": deploy(name) for name in PROCESSES},
}


def possible(world: World) -> list[str]:
    """The names of FAULTS that this world can suffer: SQLite has no server to break."""
    return [name for name in FAULTS if not (name.endswith(" sql") and "sql" not in world.servers)]


def kill_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Of this machine's process table: it asks nobody who could be broken."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            with open(f"/proc/{entry.name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found
