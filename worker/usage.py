"""What this process takes of its machine: processor, memory, and the GPU's share and memory where it has one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pynvml


class Usage:
    """Asked now and then by the thread that keeps the worker's row fresh, and at every tile for its memory."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._process = psutil.Process()
        # The first answer is about no time at all.
        self._process.cpu_percent()
        self._gpu = _gpu() if on_gpu else None

    def now(self) -> Mapping[str, float]:
        """`cpu_share` since it was last asked (1.0 is one core), `memory_bytes`; on a GPU also its share and memory."""
        told = {"cpu_share": round(self._process.cpu_percent() / 100, 3), "memory_bytes": self._memory_bytes()}
        if self._gpu is not None:
            with contextlib.suppress(pynvml.NVMLError):
                memory = pynvml.nvmlDeviceGetMemoryInfo(self._gpu)
                told |= {"vram_bytes": int(memory.used), "vram_total_bytes": int(memory.total)}
                # Last: a GPU cut into parts (MIG) has no share to tell.
                told["gpu_share"] = pynvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu / 100
        return told

    def memory(self) -> tuple[int, int | None]:
        """Bytes of this process, and of its GPU, everybody's there counted; None where that is not known."""
        vram = None
        if self._gpu is not None:
            with contextlib.suppress(pynvml.NVMLError):
                vram = int(pynvml.nvmlDeviceGetMemoryInfo(self._gpu).used)
        return self._memory_bytes(), vram

    def _memory_bytes(self) -> int:
        return int(self._process.memory_info().rss)


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process could still take: what the machine has left or, in a container, its bound less what it
    holds, files that the kernel keeps there not counted."""
    left = int(psutil.virtual_memory().available)
    # cgroup v2, where a container sees its own group as the root; "max" is no bound.
    with contextlib.suppress(OSError, ValueError, KeyError):
        bound = int((cgroup / "memory.max").read_text())
        held = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        left = min(left, bound - int(held["anon"]) - int(held["shmem"]))
    return max(0, left)


def _gpu() -> Any:
    """The driver's handle of the GPU that torch calls cuda:0; None where the driver does not say."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    try:
        pynvml.nvmlInit()
        if first.startswith("GPU-"):
            return pynvml.nvmlDeviceGetHandleByUUID(first)
        return pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)
    except pynvml.NVMLError:
        return None
