"""What a log may say: fields from a list, and nothing that looks like a secret, whoever says it."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from shared.telemetry import FIELDS, without_secrets

ROOT = Path(__file__).resolve().parents[2]
CANARIES = (
    "enl_abcdefghijklmnopqrstuvwxyz234567",
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "c0ffee5igna7ure",
    "s1gn-in-token",
    "pa55word",
)
SAYS = """
import logging, sys
from shared.telemetry import configure_logs, log
configure_logs("debug", sys.argv[1])
key, webhook, signature, token, password = sys.argv[2:]
log.info("job.claimed", job_id="job_1", attempt=2, detail=f"sent {key}", api_key="left out", Authorization="left out")
log.info("http.answered", path=f"/compat/replicate/outputs/{token}/output.png")
logging.getLogger("urllib3").debug("GET http://s3/x?X-Amz-Signature=%s&X-Amz-Expires=1 with Bearer %s", signature, key)
logging.getLogger("gunicorn").warning("GET /sign-in?token=%s&next=/ postgresql://me:%s@host/db", token, password)
try:
    local_secret = webhook
    raise ValueError(f"cannot use {webhook} at s3://user:{password}@host")
except ValueError:
    log.exception("relay.step_failed", step="rescue")
    logging.getLogger("celery").exception("a library's own")
"""


def fields_logged() -> dict[str, set[str]]:
    """Every keyword of a call of `log`, and of what is bound around them; by name, with the files."""
    found: dict[str, set[str]] = {}
    for path in (path for room in ("api", "shared", "worker") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            # `_log()`: of a module that loads the logger only where it has something to say.
            logger = node.func.value.func if isinstance(node.func.value, ast.Call) else node.func.value
            is_log = isinstance(logger, ast.Name) and logger.id in ("log", "_log")
            if is_log or node.func.attr in ("bind_contextvars", "bound_contextvars"):
                for keyword in node.keywords:
                    found.setdefault(str(keyword.arg), set()).add(path.name)
    return found


def test_every_field_that_is_logged_stands_in_the_list_and_no_other() -> None:
    logged = fields_logged()
    assert len(logged) > 30
    unknown = {name: files for name, files in logged.items() if name not in FIELDS | {"exc_info"}}
    assert unknown == {}, "say in shared.telemetry.FIELDS that it may be logged, having thought of what it may hold"
    assert set(logged) >= FIELDS


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_secret_comes_out_whichever_way_it_goes_in(form: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SAYS, form, *CANARIES], check=True, capture_output=True, text=True, cwd=ROOT
    )
    for canary in (*CANARIES, "left out "):
        assert canary not in ran.stderr, ran.stderr
    assert ran.stderr.count("[secret]") >= 8, ran.stderr
    assert "local_secret" not in ran.stderr.replace("local_secret = webhook", "")
    if form == "json":
        first = json.loads(ran.stderr.splitlines()[0])
        assert (first["job_id"], first["attempt"]) == ("job_1", 2)
        assert "Authorization, api_key" in first["detail"]
        assert "left out" not in (first.get("api_key"), first.get("Authorization"))


def test_what_is_no_secret_stays_as_it_is() -> None:
    for line in (
        "job.claimed job_id=job_01m862vgs44phj7egdqwgzaqyx key_id=key_01m862vgs44phj7egdqwgzaqyx",
        "GET http://127.0.0.1:8333/bucket/key?list-type=2",
        "http.answered path=/v1/jobs/job_1/result status=302",
        "enl_... is how a key begins",
        "at 12:30:05 http://host:8000/path and me@example.com",
    ):
        assert without_secrets(line) == line


def test_logging_is_left_as_it_was() -> None:
    """`configure_logs` is called in processes of the service only; a test that called it would change all others."""
    assert not [
        handler for handler in logging.getLogger().handlers if "structlog" in type(handler.formatter).__module__
    ]
