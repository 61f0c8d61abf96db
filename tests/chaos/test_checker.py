"""The checker is right about histories made by hand: silent about a good one, and loud about each way to be bad."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import check, recoveries
from tests.chaos.history import History, Line, read

Change = Callable[[list[Line]], Any]


def good() -> list[Line]:
    """Two jobs: one whose first process was killed, and a poisonous one. All is as it should be."""
    lines: list[Line] = [
        {"what": "submit", "key": "k1", "picture": "small", "status": 503, "id": None, "retry_after": "2"},
        {"what": "submit", "key": "k1", "picture": "small", "status": None, "id": None, "retry_after": None},
        {"what": "submit", "key": "k1", "picture": "small", "status": 202, "id": "j1", "retry_after": None},
        {"what": "submit", "key": "k1", "picture": "small", "status": 202, "id": "j1", "retry_after": None},
        {"what": "submit", "key": "k2", "picture": "poison", "status": 202, "id": "j2", "retry_after": None},
        {"what": "kill", "kind": "image child", "job": "j1", "attempt": 1, "moment": "2026-03-04T05:06:08+00:00"},
        {"what": "fault", "kind": "deploy images", "status": 0},
        *arrows("j1", "queued", "running", "queued", "running", "succeeded"),
        *arrows("j2", "queued", "running", "queued", "running", "queued", "running", "failed"),
        job("j1", "k1", "succeeded", 2, result_key="jobs/j1/xyz/result-2.png", result_sha256="aa"),
        job("j2", "k2", "failed", 3, error_code="worker-lost"),
        attempt("j1", 1, "lost", "2026-03-04T05:06:07+00:00"),
        attempt("j1", 2, "succeeded", "2026-03-04T05:06:30+00:00"),
        *(attempt("j2", number, "lost", "2026-03-04T05:06:07+00:00") for number in (1, 2, 3)),
        {"what": "blob", "key": "jobs/j1/xyz/result-2.png", "sha256": "aa", "pixels_sha256": "pp"},
        {"what": "picture", "picture": "small", "pixels_sha256": "pp"},
        # It was shared: of the first shard a worker was lost, and another has made it.
        *(shard("j1", 0, number, number + 1) for number in (0, 1)),
        shard("j1", 1, 0, 1),
        *(
            shard("j1", position, tries, tries, part=f"000{position}-{tries}.part")
            for position, tries in ((1, 1), (0, 2))
        ),
        *(shard("j1", position, tries, None, made_before=True) for position, tries in ((0, 2), (1, 1))),
        delivery("d1", "j1", "job.succeeded", "delivered", tries_used=2),
        delivery("d2", "j2", "job.failed", "abandoned", tries_used=3),
        heard("d1", "job.succeeded", "j1", answered=500),
        heard("d1", "job.succeeded", "j1", answered=204),
    ]
    return lines


def arrows(job_id: str, *states: str) -> list[Line]:
    lines: list[Line] = []
    before, attempt_before = None, None
    for state in states:
        attempt_after = (attempt_before or 0) + (state == "running")
        lines.append(
            {
                "what": "change",
                "job": job_id,
                "old_state": before,
                "new_state": state,
                "old_attempt": attempt_before,
                "new_attempt": attempt_after,
            }
        )
        before, attempt_before = state, attempt_after
    return lines


def job(job_id: str, key: str, state: str, attempts: int, **facts: Any) -> Line:
    return {
        "what": "job",
        "id": job_id,
        "key": key,
        "state": state,
        "attempt": attempts,
        "error_code": None,
        "result_key": None,
        "result_sha256": None,
        **facts,
    }


def attempt(job_id: str, number: int, outcome: str | None, started_at: str) -> Line:
    return {
        "what": "attempt",
        "job": job_id,
        "number": number,
        "outcome": outcome,
        "started_at": started_at,
        "finished_at": None if outcome is None else "2026-03-04T05:07:00+00:00",
    }


def shard(
    job_id: str, position: int, old: int, new: int | None, *, part: str | None = None, made_before: bool = False
) -> Line:
    return {
        "what": "shard",
        "job": job_id,
        "position": position,
        "old_number": old,
        "new_number": new,
        "old_made": made_before,
        "new_made": part is not None,
        "part": part,
    }


def delivery(delivery_id: str, job_id: str, type: str, state: str, *, tries_used: int) -> Line:
    return {
        "what": "delivery",
        "id": delivery_id,
        "job": job_id,
        "type": type,
        "state": state,
        "tries_used": tries_used,
        "tries_allowed": 3,
    }


def heard(delivery_id: str, type: str, job_id: str, *, answered: int) -> Line:
    return {
        "what": "heard",
        "delivery": delivery_id,
        "type": type,
        "id": job_id,
        "answered": answered,
        "sha256": "ee",
        "is_signed": True,
    }


def change(lines: list[Line], what: str, where: dict[str, Any], **values: Any) -> None:
    found = [line for line in lines if line["what"] == what and where.items() <= line.items()]
    assert found, f"there is no {what} with {where}"
    found[0].update(values)


def drop(lines: list[Line], what: str, **where: Any) -> None:
    kept = [line for line in lines if not (line["what"] == what and where.items() <= line.items())]
    assert len(kept) < len(lines)
    lines[:] = kept


def test_nothing_is_wrong_with_a_good_history() -> None:
    assert check(good()) == []


@pytest.mark.parametrize(
    ("spoil", "promise", "says"),
    [
        # An accepted job is lost.
        (lambda h: drop(h, "job", id="j1"), "G6", "not in SQL"),
        (lambda h: change(h, "job", {"id": "j1"}, state="queued"), "G1", "lost"),
        (lambda h: change(h, "job", {"id": "j1"}, state="running"), "G1", "lost"),
        # One key, two jobs.
        (lambda h: h.append({**h[2], "id": "j9"}), "G7", "answered with 2 jobs"),
        (lambda h: change(h, "job", {"id": "j2"}, key="k1"), "G7", "has made 2 jobs"),
        # Dishonest answers.
        (lambda h: change(h, "submit", {"status": 503}, status=500), "G6", "answered 500"),
        (lambda h: change(h, "submit", {"status": 503}, retry_after=None), "G6", "without Retry-After"),
        (lambda h: h.append({"what": "gave_up", "key": "k9", "status": 503}), "G6", "never accepted"),
        # Arrows that are not in the picture.
        (lambda h: h.extend(arrows("j1", "succeeded", "succeeded")[1:]), "G2", "from succeeded to succeeded"),
        (lambda h: drop(h, "change", job="j1", new_state="running", new_attempt=2), "G2", "without an arrow"),
        (lambda h: change(h, "change", {"job": "j1", "new_attempt": 2}, new_attempt=3), "G2", "its attempt by 2"),
        (lambda h: drop(h, "change", job="j2", new_state="failed"), "G2", "its last arrow led to"),
        # Two effects, or half of one.
        (lambda h: change(h, "attempt", {"job": "j1", "number": 1}, outcome="succeeded"), "G2", "[1, 2] have"),
        (lambda h: change(h, "attempt", {"job": "j1", "number": 2}, outcome="lost"), "G2", "[] have succeeded"),
        (lambda h: change(h, "attempt", {"job": "j1", "number": 1}, outcome=None), "G2", "attempt 1 has not"),
        (lambda h: drop(h, "attempt", job="j1", number=1), "G2", "has attempts [2]"),
        (lambda h: drop(h, "blob"), "G2", "not in storage"),
        (lambda h: change(h, "blob", {}, sha256="bb"), "G2", "differs"),
        (lambda h: change(h, "job", {"id": "j1"}, result_key="jobs/j1/xyz/result-1.png"), "G2", "not of attempt 2"),
        (lambda h: change(h, "job", {"id": "j2"}, result_key="jobs/j2/xyz/result-1.png"), "G2", "has a result"),
        (lambda h: h.append(delivery("d3", "j1", "job.succeeded", "delivered", tries_used=1)), "G2", "owes"),
        (lambda h: h.append(delivery("d3", "j1", "job.failed", "delivered", tries_used=1)), "G2", "owes"),
        (lambda h: drop(h, "delivery", id="d1"), "G2", "owes {}"),
        # One picture, two results.
        (lambda h: h.extend(another_result_of_the_same_picture()), "G2", "different results"),
        # Shards: a late worker's part, one made twice, one missing, and rows that are not where they belong.
        (lambda h: change(h, "shard", {"part": "0000-2.part"}, part="0000-1.part"), "G2", "is of try 2"),
        (lambda h: h.append(shard("j1", 1, 1, 2, part="0001-2.part", made_before=True)), "G2", "written again"),
        (lambda h: change(h, "shard", {"new_number": None, "position": 1}, old_made=False), "G2", "was not made"),
        (lambda h: change(h, "blob", {}, pixels_sha256="qq"), "G2", "one worker makes"),
        # Jobs harmed by others, and poison that spreads.
        (lambda h: change(h, "job", {"id": "j2"}, error_code="internal"), "G8", "failed"),
        (lambda h: h.append(attempt("j2", 4, "lost", "2026-03-04T05:06:07+00:00")), "G8", "took 4 workers"),
        (lambda h: harm(h), "G8", "failed"),
        # A result after a cancel.
        (lambda h: h.append({"what": "cancel", "id": "j1", "status": 202}), "G10", "it is succeeded"),
        # Events.
        (lambda h: change(h, "delivery", {"id": "d1"}, state="pending"), "G11", "neither delivered nor given up"),
        (lambda h: drop(h, "heard", answered=204), "G11", "nobody has heard it"),
        (lambda h: change(h, "delivery", {"id": "d2"}, tries_used=1), "G11", "given up after 1"),
        (lambda h: change(h, "heard", {"answered": 500}, sha256="ff"), "G11", "different things"),
        (lambda h: change(h, "heard", {"answered": 500}, is_signed=False), "G11", "signature"),
        (lambda h: change(h, "heard", {"answered": 500}, delivery="d9"), "G11", "not in SQL"),
        # A deploy that had to be forced.
        (lambda h: change(h, "fault", {}, status=-9), "G9", "-9"),
    ],
)
def test_what_is_wrong_is_named(spoil: Change, promise: str, says: str) -> None:
    history = good()
    spoil(history)
    found = check(history)
    assert [each for each in found if each.promise == promise and says in str(each)], found


def harm(lines: list[Line]) -> None:
    """A job that kills nobody fails, because one process was lost."""
    change(lines, "submit", {"key": "k2"}, picture="small")
    drop(lines, "attempt", job="j2", number=1)


def another_result_of_the_same_picture() -> list[Line]:
    key = "jobs/j3/xyz/result-1.png"
    return [
        {"what": "submit", "key": "k3", "picture": "small", "status": 202, "id": "j3", "retry_after": None},
        *arrows("j3", "queued", "running", "succeeded"),
        job("j3", "k3", "succeeded", 1, result_key=key, result_sha256="bb"),
        attempt("j3", 1, "succeeded", "2026-03-04T05:06:07+00:00"),
        {"what": "blob", "key": key, "sha256": "bb", "pixels_sha256": "pp"},
        delivery("d3", "j3", "job.succeeded", "delivered", tries_used=1),
        heard("d3", "job.succeeded", "j3", answered=204),
    ]


def test_recovery_is_measured_from_the_kill_to_the_next_attempt() -> None:
    assert recoveries(good()) == [22.0]
    # An attempt that had just ended by itself has nothing to recover from.
    history = good()
    change(history, "attempt", {"job": "j1", "number": 1}, outcome="succeeded")
    assert recoveries(history) == []


def test_a_history_reads_back_as_it_was_recorded(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for line in good():
        history.record(**line)
    history.close()
    assert check(read(history.path)) == []
    assert len(history.lines("submit")) == 5
