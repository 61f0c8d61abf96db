"""An upgrade rolls: the code that runs now must work with the schema that comes next. Here the code from before the
newest migration, out of git's history, takes, does and answers a job on the newest schema, API and worker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory

import migrations
from shared import stack
from shared.db import Database
from shared.models import Attempt, Job, JobState
from shared.settings import Settings
from shared.storage import Storage

ROOT = Path(__file__).resolve().parents[2]

# What the old code does with the new schema, in its own words: a submit over HTTP, an attempt, a look.
OLD_CODE = """
import io, json, sys
from datetime import UTC, datetime
import pytest
import shared
assert shared.__file__.startswith(sys.argv[1]), shared.__file__
from api.app import create_app
from shared import keys, workers
from shared.settings import load
from tests.factories import a_png
from tests.worker import a_network
from worker.enlarging import Engine
from worker.execute import Executor

settings = load()
app = create_app(settings)
context = app.extensions["enlarger"]
with context.database.transaction() as session:
    _, secret = keys.create(session, name="upgrade", scopes=("jobs", "admin"), now=datetime.now(UTC))
http = app.test_client()
headers = {"Authorization": f"Bearer {secret}"}
answer = http.post("/v1/jobs", data={"image": (io.BytesIO(a_png()), "bird.png")}, headers=headers)
assert answer.status_code == 202, answer.text
with pytest.MonkeyPatch.context() as patch:
    a_network.install(patch, lambda call: None)
    facts = workers.this_process("images", queues=["cpu.interactive"], device="cpu")
    executor = Executor(context.database, context.storage, settings, {"cpu": Engine.of(settings, "cpu")}, facts)
    executor.presence.start()
    executor.run(answer.json["id"])
    executor.presence.stop()
view = http.get(f"/v1/jobs/{answer.json['id']}", headers=headers).json
canceled = http.post("/v1/jobs", data={"image": (io.BytesIO(a_png()), "bird.png")}, headers=headers).json["id"]
http.post(f"/v1/jobs/{canceled}/cancel", headers=headers)
assert http.get("/metrics", headers=headers).status_code == 200
context.close()
print(json.dumps({"id": view["id"], "status": view["status"], "canceled": canceled}))
"""


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def code_before(tmp_path: Path) -> Path:
    """The source as it was before the newest migration was added."""
    [head] = ScriptDirectory.from_config(migrations.config("sqlite://")).get_heads()
    [file] = (ROOT / "migrations" / "versions").glob(f"{head}_*.py")
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("there is no git history here")
    added = git("log", "--diff-filter=A", "--format=%H", "--", str(file.relative_to(ROOT))).split()
    before = f"{added[-1]}^" if added else "HEAD"
    if subprocess.run(["git", "rev-parse", "--verify", "--quiet", before], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("git's history does not reach back that far")
    folder = tmp_path / "before"
    folder.mkdir()
    archive = subprocess.run(["git", "archive", before], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    assert not list((folder / "migrations" / "versions").glob(f"{head}_*.py"))
    return folder


@pytest.mark.slow
def test_the_code_of_before_works_on_the_newest_schema(
    code_before: Path, postgresql_database: Database, settings: Settings, s3: Any, redis_url: str, storage: Storage
) -> None:
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ENLARGER_")},
        **stack.environ_of(settings),
        "PYTHONPATH": str(code_before),
    }
    ran = subprocess.run(
        [sys.executable, "-c", OLD_CODE, str(code_before)],
        cwd=code_before,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["status"] == "succeeded"
    # And what it wrote is what the code of now reads.
    with postgresql_database.reading() as session:
        job = session.get_one(Job, told["id"])
        assert job.state == JobState.SUCCEEDED
        assert session.get_one(Attempt, (job.id, 1)).outcome == "succeeded"
        assert session.get_one(Job, told["canceled"]).state == JobState.CANCELED
        assert storage.facts(str(job.result_key)).bytes == job.result_bytes
