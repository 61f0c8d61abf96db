"""Whatever is raised comes to one outcome."""

from __future__ import annotations

import errno

import pytest

from shared.errors import (
    BadOutput,
    BlobMissing,
    DatabaseUnavailable,
    DeadlineExceeded,
    DeviceBroken,
    InternalError,
    InvalidImage,
    ModelUnavailable,
    OutOfMemory,
    StaleAttempt,
    StorageUnavailable,
)
from worker.outcomes import Canceled, CancelSeen, Fatal, Released, Retryable, StopSeen, Superseded, decide


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (StaleAttempt("late"), Superseded),
        (CancelSeen(), Canceled),
        (StopSeen(), Released),
        (SystemExit(1), Released),
        (KeyboardInterrupt(), Released),
        (InvalidImage("broken"), Fatal),
        (ModelUnavailable("none"), Fatal),
        (DeadlineExceeded("late"), Fatal),
        (BlobMissing("gone"), Fatal),
        (OutOfMemory("small"), Retryable),
        (BadOutput("NaN"), Retryable),
        (StorageUnavailable("away"), Released),
        (DatabaseUnavailable("away"), Released),
        (DeviceBroken("broken"), Retryable),
        (MemoryError(), Retryable),
        (OSError(errno.ENOSPC, "No space left on device"), Released),
        (OSError(errno.EIO, "Input/output error"), Retryable),
        (ZeroDivisionError(), Retryable),
    ],
)
def test_whatever_is_raised_comes_to_one_outcome(error: BaseException, outcome: type) -> None:
    assert type(decide(error, on_gpu=False, priority="bulk")) is outcome


def test_what_does_not_fit_a_gpu_goes_to_a_cpu_of_the_same_priority() -> None:
    error = OutOfMemory("small")
    assert decide(error, on_gpu=True, priority="bulk") == Retryable(error, queue="cpu.bulk")
    assert decide(error, on_gpu=False, priority="bulk") == Retryable(error, queue=None)


def test_the_customer_of_an_unforeseen_error_learns_its_kind_and_not_its_words() -> None:
    outcome = decide(ValueError("a secret path"), on_gpu=False, priority="bulk")
    assert isinstance(outcome, Retryable)
    assert isinstance(outcome.error, InternalError)
    assert "ValueError" in outcome.error.detail
    assert "secret" not in outcome.error.detail


def test_memory_that_runs_out_on_the_host_is_out_of_memory() -> None:
    outcome = decide(MemoryError(), on_gpu=False, priority="bulk")
    assert isinstance(outcome, Retryable)
    assert isinstance(outcome.error, OutOfMemory)
