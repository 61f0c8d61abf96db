"""What a decoder that a file has taken over might do: the tasks of `test_sandbox.py`."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import time
from typing import Any, BinaryIO

from shared.errors import BlockedUrl, TooManyPixels

_kept: list[Any] = []


def echo(file: BinaryIO, output: BinaryIO, **arguments: Any) -> Any:
    content = file.read()
    output.write(content[::-1])
    return {"length": len(content), **arguments}


def refuse(file: BinaryIO, output: BinaryIO) -> None:
    raise TooManyPixels(100_000, 100_000, 50)


def refuse_in_another_name(file: BinaryIO, output: BinaryIO) -> None:
    raise BlockedUrl("nobody asked about a URL", host="x")


def blunder(file: BinaryIO, output: BinaryIO) -> None:
    raise ZeroDivisionError("a fault of ours")


def crash(file: BinaryIO, output: BinaryIO, *, number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def eat(file: BinaryIO, output: BinaryIO, *, bytes: int) -> int:
    _kept.append(mmap.mmap(-1, bytes))
    return bytes


def hoard(file: BinaryIO, output: BinaryIO, *, bytes: int) -> int:
    _kept.append(bytearray(bytes))
    return bytes


def spin(file: BinaryIO, output: BinaryIO) -> None:
    while True:
        pass


def doze(file: BinaryIO, output: BinaryIO) -> None:
    time.sleep(600)


def write(file: BinaryIO, output: BinaryIO, *, bytes: int) -> int:
    return sum(output.write(b"x" * 1000) for _ in range(bytes // 1000))


def open_many(file: BinaryIO, output: BinaryIO, *, count: int) -> int:
    _kept.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(count))
    return count


def look_around(file: BinaryIO, output: BinaryIO) -> dict[str, Any]:
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    try:
        os.write(file.fileno(), b"changed")
        input_is_writable = True
    except OSError:
        input_is_writable = False
    return {
        "environment": dict(os.environ),
        "descriptors": descriptors,
        "input_is_writable": input_is_writable,
        "limits": {
            name: resource.getrlimit(getattr(resource, name))[1]
            for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE")
        },
    }


def talk_long(file: BinaryIO, output: BinaryIO) -> str:
    return "x" * (4 * 2**20)


def lie(file: BinaryIO, output: BinaryIO, *, line: str) -> None:
    """Says `line` by its own hand and is gone."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                socket.socket(fileno=int(name)).send(line.encode())
        except OSError:
            continue
    os.kill(os.getpid(), signal.SIGSEGV)


def remember(file: BinaryIO, output: BinaryIO, *, then: str = "") -> dict[str, Any]:
    """Which process this is and the files it has read. Where it has read one before, does `then` first."""
    content = file.read().decode()
    if _kept and then == "refuse":
        raise TooManyPixels(1, 1, 1)
    if _kept and then == "blunder":
        raise ZeroDivisionError
    if _kept and then == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if _kept and then == "lie":
        lie(file, output, line='{"answer": {}}\n{"answer": {}}\n')
    _kept.append(content)
    return {"pid": os.getpid(), "files": list(_kept)}


SANDBOXED = {
    task.__name__: task
    for task in (
        echo,
        refuse,
        refuse_in_another_name,
        blunder,
        crash,
        eat,
        hoard,
        spin,
        doze,
        write,
        open_many,
        look_around,
        talk_long,
        lie,
        remember,
    )
}
