from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shared import calibration
from shared.calibration import Runtime, cache_file, choose, known
from shared.catalog import card


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Runs:
    """Two runtimes, of which one is quicker; counts what is measured."""

    def __init__(self, quicker: Runtime) -> None:
        self.count = 0
        self.candidates: dict[Runtime, Callable[[], None]] = {
            "torch": lambda: self._take(0.001 if quicker == "torch" else 0.02),
            "ncnn": lambda: self._take(0.001 if quicker == "ncnn" else 0.02),
        }

    def _take(self, seconds: float) -> None:
        self.count += 1
        time.sleep(seconds)


@pytest.mark.parametrize("quicker", ["torch", "ncnn"])
def test_the_quicker_runtime_is_chosen_and_remembered(quicker: Runtime) -> None:
    first = choose(card("srgan"), "cpu", 2, Runs(quicker).candidates, 1000)
    assert first.runtime == quicker
    assert first.pixels_per_second[quicker] == max(first.pixels_per_second.values()) <= 1000 / 0.001
    again = Runs("torch")
    assert choose(card("srgan"), "cpu", 2, again.candidates, 1000) == first
    assert again.count == 0
    assert known() == [first]


def test_other_weights_threads_or_runtimes_are_measured_anew() -> None:
    runs = Runs("ncnn")
    choose(card("srgan"), "cpu", 2, runs.candidates, 1000)
    for name, threads, candidates in (
        ("srresnet", 2, runs.candidates),
        ("srgan", 1, runs.candidates),
        ("srgan", 2, {"torch": runs.candidates["torch"]}),
    ):
        before = runs.count
        choose(card(name), "cpu", threads, candidates, 1000)
        assert runs.count > before


def test_a_network_without_weights_is_not_remembered() -> None:
    choose(replace(card("srgan"), weights=None), "cpu", 2, Runs("torch").candidates, 1000)
    assert known() == []


def test_a_spoiled_file_is_measured_over() -> None:
    file = cache_file()
    assert file is not None
    file.write_text("{")
    assert known() == []
    found = choose(card("srgan"), "cpu", 2, Runs("torch").candidates, 1000)
    assert json.loads(file.read_text())
    assert known() == [found]


def test_where_the_cache_cannot_be_written_the_folder_for_temporary_files_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(calibration.tempfile, "gettempdir", lambda: str(tmp_path))
    file = cache_file()
    assert file is not None
    assert file.parent.parent == tmp_path
    # And where that is no folder of ours either, nothing is kept, and nothing fails.
    monkeypatch.setattr(calibration.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert cache_file() is None
    assert choose(card("srgan"), "cpu", 2, Runs("ncnn").candidates, 1000).runtime == "ncnn"
    assert known() == []
