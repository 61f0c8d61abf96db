"""Folders for the files of an attempt: gone when it ends, and swept after a process that was killed in the middle."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for one attempt's files, gone with all in it when the block ends."""
    with tempfile.TemporaryDirectory(prefix=f"{_scratch_prefix()}{os.getpid()}-") as name:
        yield Path(name)


def sweep_scratch() -> int:
    """Removes the folders of processes of this host that were killed in the middle of an attempt. Returns how many."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_scratch_prefix()}*"):
        owner = folder.name.removeprefix(_scratch_prefix()).partition("-")[0]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def _scratch_prefix() -> str:
    # The host's name too: containers that share a /tmp do not share process ids.
    return f"enlarger-{socket.gethostname()}-"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
