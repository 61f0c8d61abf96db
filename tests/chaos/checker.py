"""Judges a history: was an accepted job lost, did one take effect twice, did a state change as no state may?

Knows nothing of how the history came about; reads its lines and says what is wrong with them. An empty list means that
every promise was kept in this run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shared.models import TERMINAL_STATES, DeliveryState, JobState
from tests.chaos.history import Line, moment

# The arrows of shared/jobs.py: state before, state after, what the attempt's number does.
LEGAL = {
    (None, JobState.QUEUED, 0),
    (JobState.QUEUED, JobState.RUNNING, 1),
    (JobState.QUEUED, JobState.CANCELED, 0),
    (JobState.QUEUED, JobState.EXPIRED, 0),
    (JobState.RUNNING, JobState.QUEUED, 0),
    (JobState.RUNNING, JobState.SUCCEEDED, 0),
    (JobState.RUNNING, JobState.FAILED, 0),
    (JobState.RUNNING, JobState.CANCELED, 0),
}
# What a request may be told while something is broken; a connection may also just end (status None).
HONEST = {202, 409, 429, 503}
LOST_ATTEMPTS_ALLOWED = 3


@dataclass(frozen=True)
class Violation:
    promise: str
    subject: str
    detail: str

    def __str__(self) -> str:
        return f"{self.promise} {self.subject}: {self.detail}"


def check(history: Iterable[Line]) -> list[Violation]:
    """Everything that is wrong with it."""
    lines: dict[str, list[Line]] = defaultdict(list)
    for line in history:
        lines[line["what"]].append(line)
    return [
        violation
        for rule in (_answers, _accepted, _arrows, _effects, _shards, _failures, _cancels, _events, _deploys)
        for violation in rule(lines)
    ]


def recoveries(history: Iterable[Line]) -> list[float]:
    """Seconds from each kill of a process in mid-job to the start of the job's next attempt."""
    lines = list(history)
    starts = {(line["job"], line["number"]): moment(line["started_at"]) for line in lines if line["what"] == "attempt"}
    outcomes = {(line["job"], line["number"]): line["outcome"] for line in lines if line["what"] == "attempt"}
    found = []
    for line in lines:
        if line["what"] != "kill" or not line.get("job"):
            continue
        held = (line["job"], line["attempt"])
        following = starts.get((line["job"], line["attempt"] + 1))
        # An attempt that ended by itself in the instant of the kill has nothing to recover from.
        if outcomes.get(held) == "lost" and following is not None:
            found.append((following - moment(line["moment"])).total_seconds())
    return found


def _answers(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    for line in lines["submit"]:
        status = line["status"]
        if status is not None and status not in HONEST:
            yield Violation("G6", line["key"], f"was answered {status}")
        if status == 503 and not line["retry_after"]:
            yield Violation("G6", line["key"], "was answered 503 without Retry-After")
    for line in lines["gave_up"]:
        yield Violation("G6", line["key"], f"was never accepted; the last answer was {line['status']}")


def _accepted(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    rows = {line["id"]: line for line in lines["job"]}
    by_key = Counter(line["key"] for line in lines["job"])
    ids: dict[str, set[str]] = defaultdict(set)
    for line in lines["submit"]:
        if line["status"] == 202:
            ids[line["key"]].add(line["id"])
    for key, given in ids.items():
        if len(given) > 1:
            yield Violation("G7", key, f"one Idempotency-Key was answered with {len(given)} jobs")
        for job_id in given - set(rows):
            yield Violation("G6", job_id, "was answered 202 and is not in SQL")
    for key, count in by_key.items():
        if count > 1:
            yield Violation("G7", key, f"one Idempotency-Key has made {count} jobs")
    for job in rows.values():
        if job["state"] not in TERMINAL_STATES:
            yield Violation("G1", job["id"], f"is {job['state']} at the end: lost")


def _arrows(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    seen: dict[str, tuple[str, int]] = {}
    for line in lines["change"]:
        job_id, before, after = line["job"], line["old_state"], line["new_state"]
        counted = line["new_attempt"] - (line["old_attempt"] or 0)
        if (before, after, counted) not in LEGAL:
            yield Violation("G2", job_id, f"went from {before} to {after}, its attempt by {counted}")
        if before is not None and seen.get(job_id) != (before, line["old_attempt"]):
            yield Violation("G2", job_id, f"was {seen.get(job_id)} and then {before} without an arrow between")
        seen[job_id] = (after, line["new_attempt"])
    for job in lines["job"]:
        if seen.get(job["id"]) != (job["state"], job["attempt"]):
            yield Violation("G2", job["id"], f"ends as {job['state']}, its last arrow led to {seen.get(job['id'])}")


def _effects(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    attempts: dict[str, list[Line]] = defaultdict(list)
    for attempt in lines["attempt"]:
        attempts[attempt["job"]].append(attempt)
    blobs = {line["key"]: line["sha256"] for line in lines["blob"]}
    results: dict[str, Counter[str]] = defaultdict(Counter)
    pictures = {line["key"]: line["picture"] for line in lines["submit"]}
    for job in lines["job"]:
        mine = sorted(attempts[job["id"]], key=lambda attempt: attempt["number"])
        if [attempt["number"] for attempt in mine] != list(range(1, job["attempt"] + 1)):
            yield Violation("G2", job["id"], f"has attempts {[a['number'] for a in mine]}, and says {job['attempt']}")
        for attempt in mine:
            if job["state"] in TERMINAL_STATES and (attempt["outcome"] is None or attempt["finished_at"] is None):
                yield Violation("G2", job["id"], f"has ended, its attempt {attempt['number']} has not")
        # The attempt that succeeded is the record of use: what was done, on what, for how long.
        succeeded = [attempt["number"] for attempt in mine if attempt["outcome"] == "succeeded"]
        expected = [job["attempt"]] if job["state"] == JobState.SUCCEEDED else []
        if succeeded != expected:
            yield Violation("G2", job["id"], f"is {job['state']}, attempts {succeeded} have succeeded")
        if job["state"] != JobState.SUCCEEDED:
            if job["result_key"] is not None:
                yield Violation("G2", job["id"], f"is {job['state']} and has a result")
            continue
        stored = blobs.get(job["result_key"])
        if stored != job["result_sha256"]:
            yield Violation("G2", job["id"], f"its result {'is not in storage' if stored is None else 'differs'}")
        if f"result-{job['attempt']}." not in job["result_key"]:
            yield Violation("G2", job["id"], f"its result {job['result_key']} is not of attempt {job['attempt']}")
        if job["key"] in pictures:
            results[pictures[job["key"]]][job["result_sha256"]] += 1
    for picture, made in results.items():
        if len(made) > 1:
            yield Violation("G2", picture, f"the same picture has come to {len(made)} different results: {dict(made)}")


def _shards(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    """A shard is made once, by whoever has it, and a joined result has the rows of each once."""
    states = {line["id"]: line["state"] for line in lines["job"]}
    for line in lines["shard"]:
        subject = f"{line['job']}, shard {line['position']}"
        if line["new_number"] is None:
            if states.get(line["job"]) == JobState.SUCCEEDED and not line["old_made"]:
                yield Violation("G2", subject, "was not made when its job succeeded")
            continue
        if line["old_made"]:
            yield Violation("G2", subject, "was made, and was written again")
        if line["new_made"] and not line["part"].endswith(f"-{line['new_number']}.part"):
            yield Violation("G2", subject, f"is of try {line['new_number']}, and was made as {line['part']}")
    alone = {line["picture"]: line["pixels_sha256"] for line in lines["picture"]}
    pictures = {line["key"]: line["picture"] for line in lines["submit"]}
    pixels = {line["key"]: line["pixels_sha256"] for line in lines["blob"]}
    for job in lines["job"]:
        expected, found = alone.get(pictures.get(job["key"])), pixels.get(job["result_key"])
        if expected is not None and found is not None and found != expected:
            yield Violation("G2", job["id"], "its result is not the picture that one worker makes")


def _failures(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    """Nothing fails here but what kills its workers, or is killed as often by us."""
    lost = Counter(line["job"] for line in lines["attempt"] if line["outcome"] == "lost")
    poison = {line["key"] for line in lines["submit"] if line["picture"] == "poison"}
    for job in lines["job"]:
        is_given_up = (job["state"], job["error_code"], lost[job["id"]]) == (
            JobState.FAILED,
            "worker-lost",
            LOST_ATTEMPTS_ALLOWED,
        )
        if job["key"] in poison and job["state"] in TERMINAL_STATES and not is_given_up:
            if job["state"] != JobState.CANCELED:
                yield Violation("G8", job["id"], f"kills its workers and is {job['state']} after {lost[job['id']]}")
        elif job["state"] == JobState.FAILED and not is_given_up:
            yield Violation("G8", job["id"], f"failed with {job['error_code']}, {lost[job['id']]} attempts were lost")
        if lost[job["id"]] > LOST_ATTEMPTS_ALLOWED:
            yield Violation("G8", job["id"], f"took {lost[job['id']]} workers with it")


def _cancels(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    states = {line["id"]: line["state"] for line in lines["job"]}
    for line in lines["cancel"]:
        if line["status"] == 202 and states.get(line["id"]) not in (JobState.CANCELED, None):
            yield Violation("G10", line["id"], f"its cancel was accepted, and it is {states[line['id']]}")


def _events(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    owed: dict[str, Counter[str]] = defaultdict(Counter)
    deliveries = {line["id"]: line for line in lines["delivery"]}
    heard: dict[str, list[Line]] = defaultdict(list)
    for line in lines["heard"]:
        heard[line["delivery"]].append(line)
        if not line["is_signed"]:
            yield Violation("G11", line["delivery"], "came without a good signature")
        if line["delivery"] not in deliveries:
            yield Violation("G11", line["delivery"], "was heard and is not in SQL")
    for delivery in deliveries.values():
        owed[delivery["job"]][delivery["type"]] += 1
        tries = heard[delivery["id"]]
        if len({line["sha256"] for line in tries}) > 1:
            yield Violation("G11", delivery["id"], "said different things under one id")
        if delivery["state"] == DeliveryState.PENDING:
            yield Violation("G11", delivery["id"], "is neither delivered nor given up")
        if delivery["state"] == DeliveryState.DELIVERED and not any(200 <= line["answered"] < 300 for line in tries):
            yield Violation("G11", delivery["id"], "is called delivered, and nobody has heard it")
        if delivery["state"] == DeliveryState.ABANDONED and delivery["tries_used"] < delivery["tries_allowed"]:
            yield Violation("G11", delivery["id"], f"was given up after {delivery['tries_used']} tries")
    for job in lines["job"]:
        wanted = Counter({f"job.{job['state']}": 1} if job["state"] in TERMINAL_STATES else {})
        if owed[job["id"]] != wanted:
            yield Violation("G2", job["id"], f"is {job['state']} and owes {dict(owed[job['id']])}")


def _deploys(lines: dict[str, list[Line]]) -> Iterator[Violation]:
    for line in lines["fault"]:
        if line["kind"].startswith("deploy") and line["status"] != 0:
            yield Violation("G9", line["kind"], f"did not end in order: {line['status']}")
