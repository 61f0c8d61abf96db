"""Which runtime computes a network fastest on this machine: measured once, and kept in a file.

No table says it: it depends on the processor's vector units and caches and on the threads there are. The first worker
that loads a network times each runtime on a small picture, in turns, for some seconds; later ones read what it
found, and so does `enlarger doctor`. Every runtime gives the same picture within 1 level of 255.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from shared.catalog import ModelCard

Runtime = Literal["torch", "ncnn"]

ROUNDS = 6
LONGEST_SECONDS = 2.0
"""No further round after this: of a large network one takes longer, and nobody hears of progress meanwhile."""


@dataclass(frozen=True)
class Calibration:
    """What was measured of one network on one machine."""

    model: str
    scale: int
    machine: str
    """Processor or GPU, threads, and the versions of the runtimes."""
    runtime: Runtime
    """The fastest."""
    pixels_per_second: dict[Runtime, float]
    """Input px a second of each runtime there is. The best of some runs: what slows one down is other work, and that
    passes."""


def choose(
    card: ModelCard, device: str, threads: int, candidates: Mapping[Runtime, Callable[[], None]], px: int
) -> Calibration:
    """What is known of the card on this machine, or else is measured now.

    `candidates`: for each runtime what computes `px` input px once. Kept only where the card has weights, which
    together with `px` and the machine are its name in the file.
    """
    machine = _machine(device, threads)
    key = f"{card.weights.sha256} {card.scale} {px} {machine}" if card.weights else None
    known = _read(cache_file()).get(key) if key else None
    if known is not None and set(known.pixels_per_second) == set(candidates):
        return known
    best = dict.fromkeys(candidates, 0.0)
    ends_at = time.perf_counter() + LONGEST_SECONDS * len(candidates)
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            best[name] = max(best[name], px / max(time.perf_counter() - started, 1e-9))
        if time.perf_counter() > ends_at:
            break
    fastest = max(best, key=lambda name: best[name])
    found = Calibration(card.name, card.scale, machine, fastest, best)
    if key:
        _keep(key, found)
    return found


def known() -> list[Calibration]:
    """All that was measured on this machine, in the order in which it was."""
    return list(_read(cache_file()).values())


def cache_file() -> Path | None:
    """Where it is kept: the user's cache, or the folder for temporary files where it cannot be written; or None."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    for folder in (home / "enlarger", Path(tempfile.gettempdir()) / f"enlarger-cache-{os.getuid()}"):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Another user's folder of that name is not ours to trust.
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder / "calibration.json"
    return None


def _read(file: Path | None) -> dict[str, Calibration]:
    if file is None:
        return {}
    # Whatever is wrong with it, it can be measured again.
    with suppress(OSError, ValueError, TypeError):
        return {key: Calibration(**entry) for key, entry in json.loads(file.read_text()).items()}
    return {}


def _keep(key: str, found: Calibration) -> None:
    file = cache_file()
    if file is None:
        return
    entries = {**_read(file), key: found}
    text = json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=1)
    # Two workers at once: one entry may be lost, and is measured again; a torn file is never read.
    with suppress(OSError), tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
        written.write(text)
        written.flush()
        os.replace(written.name, file)


def _machine(device: str, threads: int) -> str:
    versions = []
    for package in ("torch", "ncnn"):
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    name = processor() if device == "cpu" else device
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}, {', '.join(versions)}"


def processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
