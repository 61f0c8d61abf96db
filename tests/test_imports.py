"""Who may import whom, as the architecture says it: the contracts of pyproject.toml, and what they cannot see.

import-linter reads import statements. Here processes are started and asked what they really loaded, and the source is
read for what no import shows: who publishes, and who writes a job's state.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIXELS = ("torch", "torchvision")
PAGES = ("flask", "gunicorn")
# What the API's first request brings in, or the address or database that needs it; half of what its start would take.
LATER = (
    "PIL",
    "alembic",
    "boto3",
    "celery",
    "httpx",
    "limits",
    "psycopg",
    "redis",
    "rich",
    "sqlalchemy.dialects.sqlite",
)


def test_every_import_contract_is_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed: `make test` installs it")
    ran = subprocess.run([linter, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("api.app", (*PIXELS, *LATER)),
        ("api.cli", (*PIXELS, *PAGES, "sqlalchemy", "celery")),
        ("worker.app", (*PIXELS, *PAGES)),
        ("worker.chores", (*PIXELS, *PAGES)),
        ("worker.relay", (*PIXELS, *PAGES)),
        ("worker.images", PAGES),
        ("worker.execute", PAGES),
    ],
)
def test_a_process_loads_nothing_that_its_room_forbids(module: str, unwanted: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*sorted(set({unwanted!r}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [], f"import {module} loads {ran.stdout}"


@pytest.mark.parametrize(("processes", "shared_by_them"), [(1, []), (2, ["boto3", "redis"])])
def test_processes_that_are_forked_share_what_each_would_load(processes: int, shared_by_them: list[str]) -> None:
    program = f"""if True:
        import gc, sys, threading, types
        from api import processes
        processes.when_ready(types.SimpleNamespace(cfg=types.SimpleNamespace(workers={processes})))
        # A fork would have threads' locks and not the threads; and what is frozen is never copied for a collection.
        assert threading.active_count() == 1 and gc.isenabled() and gc.get_freeze_count() > 100_000
        print(*sorted(set({LATER!r}) & set(sys.modules)))
        """
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == shared_by_them


def test_tiling_uses_only_the_standard_library() -> None:
    imported = set(imported_modules(parsed(ROOT / "worker" / "tiling.py")))
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_the_installer_uses_only_the_standard_library() -> None:
    imported = set(imported_modules(parsed(ROOT / "shared" / "install.py")))
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_only_outbox_publishes() -> None:
    doors = {"delay", "apply_async", "send_task"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in doors
    ]
    assert [place for place in found if not place.startswith("shared/outbox.py:")] == []


def test_only_jobs_and_deliveries_write_state() -> None:
    # The client's Job is the wire's: it has no row to write.
    writers = {ROOT / "shared" / "jobs.py", ROOT / "shared" / "deliveries.py", ROOT / "api" / "client.py"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        if path not in writers
        for node in ast.walk(parsed(path))
        if writes_state(node)
    ]
    assert found == []


def test_the_check_for_writes_of_state_sees_each_way_to_write_it() -> None:
    ways = [
        "job.state = JobState.FAILED",
        "session.execute(update(Job).where(Job.id == id).values(state=JobState.FAILED))",
        "session.execute(update(Job).values({Job.state: JobState.FAILED}))",
        "session.execute(update(Job).values({'attempt': Job.attempt + 1}))",
        "session.execute(insert(Delivery).values(job_id=id))",
        "session.add(Job(id=id))",
    ]
    assert [way for way in ways if not any(writes_state(node) for node in ast.walk(ast.parse(way)))] == []
    # Asking for a state is everybody's business, and so is outbox's note of when a message was sent its own.
    harmless = ["select(Job).where(Job.state == wanted)", "update(Job).values(published_at=now)"]
    assert [way for way in harmless if any(writes_state(node) for node in ast.walk(ast.parse(way)))] == []


def writes_state(node: ast.AST) -> bool:
    """Whether this sets a state or the number of an attempt, or makes a Job, an Attempt or a Delivery."""
    columns, rows = {"state", "attempt"}, {"Job", "Attempt", "Delivery"}
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Attribute) and target.attr == "state" for target in targets)
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and node.func.attr == "values":
        named = {keyword.arg for keyword in node.keywords}
        for argument in node.args:
            if isinstance(argument, ast.Dict):
                named |= {key.attr for key in argument.keys if isinstance(key, ast.Attribute)}
                named |= {str(key.value) for key in argument.keys if isinstance(key, ast.Constant)}
        return not columns.isdisjoint(named)
    if not isinstance(node.func, ast.Name):
        return False
    first = node.args[0] if node.args else None
    inserts = node.func.id == "insert" and isinstance(first, ast.Name) and first.id in rows
    return inserts or node.func.id in rows


def sources() -> list[Path]:
    return sorted(path for room in ("api", "shared", "worker") for path in (ROOT / room).rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
