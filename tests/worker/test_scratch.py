"""Files of an attempt are gone when it ends, also where its process was killed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from worker import scratch
from worker.scratch import scratch_folder, sweep_scratch


def test_files_of_a_killed_process_are_removed_and_those_of_a_live_one_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = scratch._scratch_prefix() + "999999999-x"
    for name in (dead, scratch._scratch_prefix() + f"{os.getppid()}-x", "enlarger-elsewhere-1-x", "other"):
        (tmp_path / name).mkdir()
    with scratch_folder() as mine:
        assert sweep_scratch() == 1
        assert mine.is_dir()
        assert not (tmp_path / dead).exists()
        assert len(list(tmp_path.iterdir())) == 4
    assert not mine.exists()


def test_an_init_process_counts_as_running() -> None:
    # Another user's process may not be signalled, and is there all the same.
    assert scratch._is_running(1)
