"""What an attempt came to, and which errors come to what.

Deciding is all that is done here: `worker.recording` writes outcomes down.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import DeviceBroken, DiskFull, EnlargerError, InternalError, OutOfMemory, StaleAttempt, Unavailable
from shared.jobs import JobResult
from shared.telemetry import log, tallies


@dataclass(frozen=True)
class Succeeded:
    result: JobResult


@dataclass(frozen=True)
class Retryable:
    """Another attempt may do better. `queue` sends it to another device's queue."""

    error: EnlargerError
    queue: str | None = None


@dataclass(frozen=True)
class Fatal:
    """No attempt will do better."""

    error: EnlargerError


@dataclass(frozen=True)
class Canceled:
    """The customer has taken the job back."""


@dataclass(frozen=True)
class Released:
    """The job goes back to its queue and this attempt does not count: the worker is asked to stop, or a server it
    depends on does not answer, which `error` names."""

    error: EnlargerError | None = None


@dataclass(frozen=True)
class Superseded:
    """Another attempt owns the job, or it is gone: there is nothing to record."""


@dataclass(frozen=True)
class Helped:
    """A shard of somebody else's attempt is made."""


Outcome = Succeeded | Retryable | Fatal | Canceled | Released | Superseded | Helped


class CancelSeen(Exception):
    """Raised between tiles: the customer has asked to cancel."""


class StopSeen(Exception):
    """Raised between tiles: this process has been asked to stop."""


def decide(error: BaseException, *, on_gpu: bool, priority: str) -> Outcome:
    """What an attempt that raised `error` came to."""
    match error:
        case StaleAttempt():
            return Superseded()
        case CancelSeen():
            return Canceled()
        case StopSeen() | SystemExit() | KeyboardInterrupt():
            return Released()
        case OutOfMemory() if on_gpu:
            # The customer gets a picture and not an error, also where a GPU was asked for by name.
            return Retryable(error, queue=f"cpu.{priority}")
        case OSError() if error.errno in DiskFull.ERRNOS:
            return Released(DiskFull())
        case MemoryError():
            return Retryable(OutOfMemory("The worker ran out of memory."))
        case Unavailable() if error.retryable:
            # Not the job's fault, and perhaps every job's lot for hours: they wait, and none uses up its attempts.
            return Released(error)
        case DeviceBroken() if error.facts.get("only_waited"):
            # Whatever broke it, this job had no part in it: of jobs side by side a bad one must not use up the others'
            # attempts.
            return Released()
        case EnlargerError():
            return Retryable(error) if error.retryable else Fatal(error)
        case _:
            return Retryable(InternalError(f"Something unforeseen happened: {type(error).__name__}."))


def name_of(outcome: Outcome) -> str:
    """As logs, metrics and traces have it."""
    return type(outcome).__name__.lower()


def count(outcome: Outcome, model: str) -> None:
    """What an attempt came to, for `/metrics`."""
    tallies.count("enlarger_attempts_total", outcome=name_of(outcome))
    if isinstance(outcome, Succeeded):
        result = outcome.result
        tallies.count("enlarger_output_megapixels_total", result.width * result.height / 1e6, model=model)
        for name, seconds in result.timings.items():
            # Beside the seconds of phases there are numbers of what the work was.
            if name.endswith("_seconds") and name != "queued_seconds":
                tallies.observe("enlarger_phase_seconds", seconds, phase=name.removesuffix("_seconds"))


def log_broken_off(error: BaseException, outcome: Outcome) -> None:
    what = f"{type(error).__name__}: {error}"
    if isinstance(outcome, Retryable) and isinstance(outcome.error, InternalError):
        log.warning("job.attempt_broken_off", error=what, exc_info=error)
    else:
        log.info("job.attempt_broken_off", error=what)
