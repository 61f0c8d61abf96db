"""What a worker says it takes of its machine. The driver of a GPU is played: none is needed to read what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from worker.usage import Usage, available_bytes


def test_without_a_gpu_it_tells_processor_and_memory() -> None:
    told = Usage(on_gpu=False).now()
    assert set(told) == {"cpu_share", "memory_bytes"}
    assert told["memory_bytes"] > 1_000_000


def test_a_gpu_whose_driver_is_silent_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", silent)
    usage = Usage(on_gpu=True)
    assert set(usage.now()) == {"cpu_share", "memory_bytes"}
    assert usage.memory()[1] is None


@pytest.mark.parametrize(
    ("visible", "asked"), [("", 0), ("2,3", 2), ("GPU-8f1b", "GPU-8f1b")], ids=["all", "by number", "by name"]
)
def test_a_gpu_tells_its_share_and_memory(monkeypatch: pytest.MonkeyPatch, visible: str, asked: Any) -> None:
    handles: list[Any] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: handles.append(index) or index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: handles.append(name) or name)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(used=9, total=24))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda _: SimpleNamespace(gpu=87))
    usage = Usage(on_gpu=True)
    told = usage.now()
    assert handles == [asked]
    assert (told["gpu_share"], told["vram_bytes"], told["vram_total_bytes"]) == (0.87, 9, 24)
    assert usage.memory()[1] == 9


def test_what_is_available_is_bounded_by_the_container(tmp_path: Path) -> None:
    machine = available_bytes(tmp_path / "none")
    assert machine > 1_000_000
    (tmp_path / "memory.stat").write_text("anon 700\nfile 100000\nshmem 50\n")
    for bound, available in (("1000\n", 250), ("600\n", 0)):
        (tmp_path / "memory.max").write_text(bound)
        assert available_bytes(tmp_path) == available
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 1_000_000
