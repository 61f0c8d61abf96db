"""The short form of `make chaos`, and the controls: with a promise's mechanism switched off, the checker must object.

The long form is `python -m tests.chaos`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import run
from tests.chaos.checker import check
from tests.chaos.world import SHARED, World


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_done_twice_whatever_is_broken(tmp_path: Path) -> None:
    with World(tmp_path, seed=1, sql="postgresql", **SHARED) as world:
        run.storm(world, run.SHORT, jobs=198, poison=2, longest_fault_seconds=0.8)
        run.lose_helpers(world, kills=1, stops=1)
        world.settle()
        violations = check(world.history)
        made = run.figures(world.history)
        assert not violations, "\n".join(map(str, violations))
        assert made["kills"] >= 10
        assert sum(made["jobs"].values()) >= 200
        # The chaos has met what it was to meet.
        assert made["attempts"]["lost"] > 0
        assert made["webhook_calls_refused"] > 0
        assert made["shards_made"] > 0
        assert made["helpers_lost"] > 0


@pytest.mark.slow
def test_control_without_relay_and_rescue_jobs_are_lost(tmp_path: Path) -> None:
    violations = run.without_relay(tmp_path, seed=2)
    assert [each for each in violations if each.promise == "G1"], violations


@pytest.mark.slow
def test_control_without_the_fence_a_late_worker_takes_effect_a_second_time(tmp_path: Path) -> None:
    violations = run.without_fence(tmp_path, seed=3)
    assert [each for each in violations if "have succeeded" in str(each)], violations
    assert [each for each in violations if "owes" in str(each)], violations
