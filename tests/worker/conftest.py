"""What several files of tests of the worker share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.db import Database
from shared.settings import Settings
from shared.storage import Storage
from tests.worker.a_bench import Bench


@pytest.fixture
def bench(
    sqlite_database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    yield Bench(sqlite_database, storage, settings, monkeypatch)
    # This process's only: another run of the tests, or a service, may be at work on the same machine.
    left = list(Path(tempfile.gettempdir()).glob(f"enlarger-*-{os.getpid()}-*"))
    assert not left, f"an attempt left files behind: {left}"
