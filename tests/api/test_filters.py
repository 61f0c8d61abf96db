"""The filter of the operator's list, and the command that hands a picture in once more."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from api import curl, filters
from shared.db import Database, clock
from shared.errors import InvalidRequest
from shared.models import Job, JobState
from shared.queries import JobFilter, count_jobs, page_of_jobs
from tests.api.conftest import served
from tests.factories import a_claim, a_job, a_job_in, a_key, a_png

NOW = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)


def test_a_filter_is_read_as_it_is_typed() -> None:
    typed = 'status:failed,expired model:srgan key:"the shop" after:2h before:2026-03-04T05:00 cat'
    assert filters.read(typed, now=NOW) == JobFilter(
        any_of=(("state", ("failed", "expired")), ("model", ("srgan",))),
        owner="the shop",
        created_after=NOW - timedelta(hours=2),
        created_before=datetime(2026, 3, 4, 5, 0, tzinfo=UTC),
        words=("cat",),
    )
    assert filters.read("", now=NOW) == JobFilter()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("modle:srgan", "There is no filter `modle:`. There are status:, model:"),
        ("status:fialed", "There is no status `fialed`. There are queued, running"),
        ("queue:tpu.bulk", "There are gpu.interactive"),
        ("status:", "needs a value right after the colon, as in `status:failed,expired`"),
        ("after:yesterday", "`after:yesterday` is no time: write a span"),
        ("after:999999d", "is no time"),
        ('key:"the shop', "quotation mark"),
    ],
)
def test_a_filter_that_cannot_be_read_is_told_what_there_is(typed: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        filters.read(typed, now=NOW)
    assert said in told.value.detail


@given(st.text(max_size=40))
def test_whatever_is_typed_is_read_or_refused_in_words(typed: str) -> None:
    with suppress(InvalidRequest):
        assert isinstance(filters.read(typed, now=NOW), JobFilter)


@pytest.mark.parametrize("line", filters.HELP, ids=lambda line: line.example)
def test_what_the_page_tells_to_type_can_be_typed(line: filters.Help) -> None:
    assert filters.read(line.example, now=NOW) != JobFilter()


def test_the_list_holds_what_matches_and_no_more(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        shop, other = a_key(session, now, name="the shop"), a_key(session, now, name="other")
        cat = a_job(session, shop, now, name="Cat_100%.png", external_id="order-7").id
        dog = a_job(session, other, now + timedelta(hours=3), name="dog.png", model="srresnet", queue="cpu.bulk").id
        failed, _ = a_job_in(JobState.FAILED, session, shop, now + timedelta(hours=1))
        running = a_job(session, shop, now + timedelta(hours=2)).id
        a_claim(session, running, now, worker_id="w7")
    ids = {cat: "cat", dog: "dog", failed.id: "failed", running: "running"}

    def found(typed: str) -> set[str]:
        with database.reading() as session:
            wanted = filters.read(typed, now=now + timedelta(hours=3))
            page = page_of_jobs(session, wanted, limit=10, cursor=None)
            assert count_jobs(session, wanted) == len(page.rows)
            return {ids[job.id] for job in page.rows}

    assert found("") == {"cat", "dog", "failed", "running"}
    assert found("status:queued") == {"cat", "dog"}
    assert found("status:failed,running") == {"failed", "running"}
    assert found("model:srresnet queue:cpu.bulk") == {"dog"}
    assert found('key:"the shop" status:queued') == {"cat"}
    assert found(f"key:{other.id}") == {"dog"}
    assert found("after:90m") == {"dog", "running"}
    assert found("before:150m") == {"cat"}
    assert found("CAT_100%") == {"cat"}, "letters' case does not matter, and % is no wildcard"
    assert found("%") == {"cat"}
    assert found(f"id:{cat}") == {"cat"}
    assert found(dog[-8:]) == {"dog"}
    assert found("error:invalid-image") == {"failed"}
    assert found("worker:w7") == {"running"}
    assert found("external:order-7") == {"cat"}
    assert found("nothing-like-it") == set()


# --- as a command ----------------------------------------------------------------------------------------------------


def test_the_command_hands_in_the_same_job(api: Any) -> None:
    """Read as a shell reads it, and its fields sent as curl sends them."""
    caller = api.caller("jobs")
    asked = {
        "scale": "3",
        "format": "jpeg",
        "classify": "true",
        "quality": "81",
        "metadata": "strip",
        "alpha": "flatten",
        "background": "#00ff7f",
        "priority": "bulk",
        "deadline_seconds": "900",
        "ttl_seconds": "5000",
        "external_id": '@it\'s "7" & $more',
    }
    first = caller.job(name="cat.png", **asked)
    with api.database.reading() as session:
        job = session.get_one(Job, first)
    words = shlex.split(curl.command(job, "http://127.0.0.1:8000/"))
    assert words[:3] == ["curl", "-sS", "http://127.0.0.1:8000/v1/jobs"]
    assert "Authorization: Bearer $ENLARGER_API_KEY" in words
    fields = dict(word.split("=", 1) for flag, word in pairwise(words) if flag == "--form-string")
    second = caller.job(name=job.input_name, **fields)
    with api.database.reading() as session:
        twice = [session.execute(select(Job.__table__).where(Job.id == id)).mappings().one() for id in (first, second)]
    own = {
        "id",
        "blob_prefix",
        "input_key",
        "created_at",
        "queued_at",
        "deadline_at",
        "published_at",
        "published_count",
        "start_tag_px",
    }
    differing = {name for name in twice[0] if twice[0][name] != twice[1][name]} - own - {"published_generation"}
    assert differing == set()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("name", ["cat.png", "it's a cat; two, three.png", 'the "cat" \\ $HOME.png'])
def test_the_command_can_be_pasted_into_a_shell(api: Any, tmp_path: Path, name: str) -> None:
    caller = api.caller("jobs")
    (tmp_path / name).write_bytes(a_png())
    with api.database.transaction() as session:
        job = a_job(session, caller.key_id, clock(session), name=name, external_id="@`whoami`")
    with served(api.app) as url:
        shell = {"PATH": os.environ["PATH"], "ENLARGER_API_KEY": caller.secret}
        command = ["sh", "-c", curl.command(job, url)]
        ran = subprocess.run(command, cwd=tmp_path, env=shell, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["external_id"] == "@`whoami`", ran.stderr


def test_a_usual_job_makes_a_short_command(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        job = a_job(session, a_key(session, now), now, name="cat.png", ttl_seconds=604800)
        assert curl.command(job, "https://enlarger.example") == (
            "curl -sS https://enlarger.example/v1/jobs \\\n"
            '  -H "Authorization: Bearer $ENLARGER_API_KEY" \\\n'
            "  -F image=@cat.png \\\n"
            "  --form-string model=srgan \\\n"
            "  --form-string scale=4 \\\n"
            "  --form-string format=png \\\n"
            "  --form-string ttl_seconds=604800"
        )
