"""Whatever a child of the sandbox does, its caller gets an answer or an error of ours, and the next file its turn."""

from __future__ import annotations

import io
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from shared.errors import BlockedUrl, InternalError, InvalidImage, TooManyPixels, Unavailable, UploadRejected
from shared.sandbox import Limits, Sandbox
from tests.conftest import has_ended, wait_until

LIMITS = Limits(memory_bytes=100_000_000, cpu_seconds=60, wall_seconds=60, output_bytes=1_000_000)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox("tests.shared.sandbox_tasks")
    yield made
    made.close()


def ask(sandbox: Sandbox, task: str, limits: Limits = LIMITS, content: bytes = b"abc", **arguments: Any) -> Any:
    return sandbox.run(task, io.BytesIO(content), limits, **arguments)[0]


def still_works(sandbox: Sandbox) -> bool:
    return bool(ask(sandbox, "echo") == {"length": 3})


@pytest.mark.parametrize("kind", ["memory", "file", "spooled"])
def test_a_file_goes_in_and_answer_and_output_come_back(sandbox: Sandbox, kind: str) -> None:
    made: dict[str, Any] = {
        "memory": io.BytesIO,
        "file": tempfile.TemporaryFile,
        "spooled": tempfile.SpooledTemporaryFile,
    }
    with made[kind]() as file:
        file.write(b"0123456789")
        answer, output = sandbox.run("echo", file, LIMITS, beside=[1, None])
        assert answer == {"length": 10, "beside": [1, None]}
        assert output is not None
        assert output[:] == b"9876543210"
        assert file.read() == b"0123456789", "the position is back at the start"


def test_what_a_task_refuses_is_refused_here_with_its_facts(sandbox: Sandbox) -> None:
    with pytest.raises(TooManyPixels, match="100000 x 100000 px") as refused:
        ask(sandbox, "refuse")
    assert refused.value.facts == {"width_px": 100_000, "height_px": 100_000, "limit_px": 50}
    with pytest.raises(BlockedUrl):
        ask(sandbox, "refuse_in_another_name")


def test_a_fault_of_ours_in_a_task_is_internal_and_told_to_nobody_outside(sandbox: Sandbox) -> None:
    with pytest.raises(InternalError) as raised:
        ask(sandbox, "blunder")
    assert "ZeroDivisionError" not in raised.value.detail
    assert still_works(sandbox)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE])
def test_a_child_that_crashes_is_the_files_fault(sandbox: Sandbox, number: int) -> None:
    before = sandbox.pid
    with pytest.raises(InvalidImage, match="broke off"):
        ask(sandbox, "crash", number=int(number))
    assert still_works(sandbox)
    assert before in (None, sandbox.pid), "the warm process lives on"


def test_a_child_that_somebody_else_kills_is_nobodys_fault(sandbox: Sandbox) -> None:
    with pytest.raises(Unavailable):
        ask(sandbox, "crash", number=int(signal.SIGKILL))
    assert still_works(sandbox)


def test_memory_beyond_the_limit_is_not_to_be_had(sandbox: Sandbox) -> None:
    limits = replace(LIMITS, memory_bytes=50_000_000)
    assert ask(sandbox, "hoard", limits, bytes=40_000_000) == 40_000_000
    assert sandbox.last_spent is not None
    assert 40_000_000 < sandbox.last_spent.peak_bytes < 150_000_000
    with pytest.raises(InvalidImage, match="more memory"):
        ask(sandbox, "hoard", limits, bytes=60_000_000)
    # Also where memory is asked for and not touched.
    with pytest.raises((InvalidImage, InternalError)):
        ask(sandbox, "eat", limits, bytes=10**12)
    assert still_works(sandbox)


def test_a_child_that_never_ends_runs_out_of_processor_time(sandbox: Sandbox) -> None:
    with pytest.raises(InvalidImage, match="takes longer"):
        ask(sandbox, "spin", replace(LIMITS, cpu_seconds=1))
    assert still_works(sandbox)


def test_a_child_that_sleeps_is_hung_up_on_and_killed(sandbox: Sandbox) -> None:
    assert still_works(sandbox)
    with pytest.raises(Unavailable, match="within"):
        ask(sandbox, "doze", replace(LIMITS, wall_seconds=0.5))
    wait_until(lambda: children_of(sandbox) == [], seconds=30, what="the sleeper to be killed")
    assert still_works(sandbox)


def children_of(sandbox: Sandbox) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == sandbox.pid:
            found.append(int(path.parent.name))
    return found


def test_files_and_written_bytes_are_counted(sandbox: Sandbox) -> None:
    assert ask(sandbox, "write", bytes=900_000) == 900_000
    for task, arguments in (("write", {"bytes": 2_000_000}), ("open_many", {"count": 100})):
        with pytest.raises((InvalidImage, InternalError)):
            ask(sandbox, task, **arguments)
    with pytest.raises(InternalError):
        ask(sandbox, "write", replace(LIMITS, output_bytes=0), bytes=1000)
    assert still_works(sandbox)


def test_a_child_knows_no_secret_and_holds_nothing_but_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENLARGER_SECRET_KEY", "ENLARGER_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "HOME_GROWN"):
        monkeypatch.setenv(name, "canary-of-the-environment")
    sandbox = Sandbox("tests.shared.sandbox_tasks")
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as other:
        file.write(b"input")
        os.set_inheritable(other.fileno(), True)
        try:
            seen, _ = sandbox.run("look_around", file, LIMITS)
        finally:
            sandbox.close()
        assert file.read() == b"input"
    assert "canary-of-the-environment" not in str(seen)
    assert not [name for name in seen["environment"] if name.startswith(("ENLARGER", "AWS"))]
    # Standard input and output, the input, the output, its call, and the folder it has just listed.
    assert len([path for path in seen["descriptors"] if path.startswith("socket:")]) == 1, seen["descriptors"]
    assert len([path for path in seen["descriptors"] if path != os.devnull]) <= 4, seen["descriptors"]
    assert seen["input_is_writable"] is False
    assert seen["limits"]["RLIMIT_CORE"] == 0
    assert 0 < seen["limits"]["RLIMIT_AS"] < 2**32
    assert (seen["limits"]["RLIMIT_CPU"], seen["limits"]["RLIMIT_FSIZE"]) == (61, 1_000_000)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense\n",
        '{"answer": {"length": 3}}\n',
        '{"error": "StaleAttempt", "detail": "x", "facts": {}}\n',
        '{"error": "TooManyPixels", "detail": 7, "facts": "x"}\n',
        "[1, 2]\n",
        "\nexit 0 0.1 100\n",
        '{"error": "InternalError"}\n\nexit 0 0.1 100\n',
    ],
)
def test_a_child_that_talks_nonsense_is_not_believed(sandbox: Sandbox, line: str) -> None:
    with pytest.raises((UploadRejected, InternalError)):
        ask(sandbox, "lie", line=line)
    assert still_works(sandbox)


def test_a_child_that_talks_too_long_is_cut_off(sandbox: Sandbox) -> None:
    with pytest.raises(Unavailable):
        ask(sandbox, "talk_long", replace(LIMITS, wall_seconds=30))
    assert still_works(sandbox)


def test_files_are_read_side_by_side(sandbox: Sandbox) -> None:
    stopping = threading.Event()

    def dozer() -> None:
        with pytest.raises(Unavailable):
            ask(sandbox, "doze", replace(LIMITS, wall_seconds=5))
        stopping.set()

    with ThreadPoolExecutor(12) as threads:
        slow = threads.submit(dozer)
        answers = list(threads.map(lambda n: ask(sandbox, "echo", content=b"x" * n)["length"], range(40)))
        assert answers == list(range(40))
        assert not stopping.is_set(), "nobody waited for the one that sleeps"
        slow.result()


INSPECTING = replace(LIMITS, output_bytes=0)


def seen(sandbox: Sandbox, content: bytes, owner: str | None, limits: Limits = INSPECTING, **more: Any) -> Any:
    return sandbox.run("remember", io.BytesIO(content), limits, owner=owner, **more)[0]


@pytest.fixture
def own_sandbox() -> Iterator[Sandbox]:
    """Whose children are this test's."""
    made = Sandbox("tests.shared.sandbox_tasks")
    yield made
    made.close()
    assert children_of(made) == []


def test_a_child_stays_for_its_owners_files_and_reads_nobody_elses(own_sandbox: Sandbox) -> None:
    first = seen(own_sandbox, b"a1", "ann")
    assert seen(own_sandbox, b"b1", "bob")["files"] == ["b1"]
    assert seen(own_sandbox, b"n1", None)["files"] == ["n1"]
    assert seen(own_sandbox, b"a2", "ann") == {"pid": first["pid"], "files": ["a1", "a2"]}
    assert seen(own_sandbox, b"b2", "bob")["files"] == ["b1", "b2"]
    assert seen(own_sandbox, b"a3", "ann", replace(INSPECTING, cpu_seconds=59))["files"] == ["a3"], "other limits"
    assert len(children_of(own_sandbox)) == 3


@pytest.mark.parametrize("then", ["refuse", "blunder", "crash", "lie"])
def test_what_is_no_plain_answer_of_a_child_that_stayed_is_asked_of_another(own_sandbox: Sandbox, then: str) -> None:
    """So a file can refuse its owner's other files nothing, and a child that has gone wrong is gone."""
    first = seen(own_sandbox, b"a1", "ann")
    second = seen(own_sandbox, b"a2", "ann", then=then)
    assert second["files"] == ["a2"]
    assert second["pid"] != first["pid"]
    wait_until(lambda: children_of(own_sandbox) == [second["pid"]], seconds=30, what="the first to be gone")


def test_a_child_that_answers_badly_does_not_stay(own_sandbox: Sandbox) -> None:
    with pytest.raises(TooManyPixels):
        own_sandbox.run("refuse", io.BytesIO(b"a1"), INSPECTING, owner="ann")
    assert seen(own_sandbox, b"a2", "ann")["files"] == ["a2"]


def test_children_that_stay_are_few_and_read_so_many_files(
    own_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.sandbox.STAYS_FOR_FILES", 2)
    monkeypatch.setattr("shared.sandbox.STAYING_CHILDREN", 2)
    assert [len(seen(own_sandbox, b"x", "ann")["files"]) for _ in range(5)] == [1, 2, 1, 2, 1]
    for owner in ("bob", "cleo"):
        seen(own_sandbox, b"x", owner)
    wait_until(lambda: len(children_of(own_sandbox)) == 2, seconds=30, what="the one that waited longest to be gone")
    assert [len(seen(own_sandbox, b"x", owner)["files"]) for owner in ("bob", "cleo", "ann")] == [2, 2, 1]


def test_a_child_that_nobody_asks_goes_and_the_next_file_does_not_notice(own_sandbox: Sandbox) -> None:
    first = seen(own_sandbox, b"a1", "ann")
    wait_until(lambda: children_of(own_sandbox) == [], seconds=60, what="the child to have waited long enough")
    second = seen(own_sandbox, b"a2", "ann")
    assert second["files"] == ["a2"]
    assert second["pid"] != first["pid"]


def test_a_child_that_stayed_and_sleeps_is_hung_up_on_and_killed(own_sandbox: Sandbox) -> None:
    limits = replace(INSPECTING, wall_seconds=0.5)
    first = seen(own_sandbox, b"a1", "ann", limits)["pid"]
    with pytest.raises(Unavailable, match="within"):
        own_sandbox.run("doze", io.BytesIO(b"a2"), limits, owner="ann")
    wait_until(lambda: has_ended(first), seconds=30, what="the sleeper to be killed")
    assert seen(own_sandbox, b"a3", "ann", limits)["files"] == ["a3"]


def test_owners_files_are_read_side_by_side(own_sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(8) as threads:
        told = list(threads.map(lambda n: (n, seen(own_sandbox, b"%d" % n, f"owner{n % 2}")["files"]), range(200)))
    assert all(files[-1] == str(n) for n, files in told)
    assert all(int(file) % 2 == n % 2 for n, files in told for file in files)


def test_a_warm_process_that_dies_is_replaced(sandbox: Sandbox) -> None:
    assert still_works(sandbox)
    first = sandbox.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: has_ended(first), seconds=30, what="the warm process to be dead")
    assert still_works(sandbox)
    assert sandbox.pid not in (None, first)


def test_a_warm_process_heeds_no_signal_of_its_group_and_ends_with_its_owner() -> None:
    sandbox = Sandbox("tests.shared.sandbox_tasks")
    assert still_works(sandbox)
    pid = sandbox.pid
    assert pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(pid, number)
    assert still_works(sandbox)
    assert sandbox.pid == pid
    sandbox.close()
    assert has_ended(pid)
    # Closed is not the end: whoever asks again gets another.
    assert still_works(sandbox)
    sandbox.close()


def test_a_module_that_cannot_be_imported_is_an_error_and_no_hang() -> None:
    sandbox = Sandbox("tests.shared.no_such_module")
    began = time.monotonic()
    with pytest.raises(Unavailable, match="did not start"):
        ask(sandbox, "echo")
    assert time.monotonic() - began < 60
    sandbox.close()


def test_a_file_that_cannot_be_flushed_is_read_all_the_same(sandbox: Sandbox) -> None:
    class Bare:
        """As little of a file as some libraries hand out."""

        def __init__(self, content: bytes) -> None:
            self._file = io.BytesIO(content)
            self.read, self.seek = self._file.read, self._file.seek

    bare: Any = Bare(b"abc")
    file: BinaryIO = bare
    assert sandbox.run("echo", file, LIMITS)[0] == {"length": 3}
