"""Strangers' files are read in a process of their own, which holds nothing and may use little.

A decoder is much C code fed with bytes of somebody else's choosing: it may crash, eat memory, never end, or do what the
bytes say. So it runs in a child, made for this one file, with limits on memory, processor time, open files and written
bytes, with no secret in its environment and no connection but the one it answers by. What becomes of the child is the
file's fault and harms nobody.

One warm process imports the decoders once and forks such a child for each file, which takes some milliseconds where a
fresh interpreter takes half a second:

    Sandbox.run --(task, read-only file, empty output)--> warm process --fork--> child: limits, then the task
        ^-------------------- a line of JSON; pixels and the like in the output, by shared memory ------'

What a child says is not believed: errors are rebuilt from a list, and whoever calls checks the answer's shape.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import io
import json
import mmap
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from shared.errors import EnlargerError, InternalError, InvalidImage, Unavailable, UploadRejected

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger

Task = Callable[..., Any]
"""Called in the child as `task(file, output, **arguments)`: two binary files, the first read-only, the second empty and
only to be written. What it returns goes home as JSON. A module names its tasks in `SANDBOXED`; where it has a function
`warm_up`, the warm process calls it once, before it makes children."""

START_SECONDS = 60.0
"""Importing the decoders takes half a second on a machine that has nothing else to do."""
KEPT_IN_MEMORY_BYTES = 32 * 2**20
"""What a child has written stays in memory up to this; more goes to disk."""
_REQUEST_BYTES = 64 * 1024
_ANSWER_BYTES = 2**20
_CHILD_FILES = 64
# One thread each: the child's memory is counted in addresses, of which every thread takes many.
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "VIPS_CONCURRENCY": "1",
}


@dataclass(frozen=True)
class Limits:
    """What one child may use."""

    memory_bytes: int
    """Of addresses, beyond what the warm process has (RLIMIT_AS): more than it can ever hold in memory."""
    cpu_seconds: int
    wall_seconds: float
    output_bytes: int


@dataclass(frozen=True)
class Spent:
    """What a child has used, by the kernel's count."""

    cpu_seconds: float
    peak_bytes: int
    """Resident at most; the warm process's own pages, which it shares, are counted too."""


class Sandbox:
    """One warm process and the children it makes. Thread-safe; starts with the first file, or with `start`."""

    def __init__(self, module: str) -> None:
        """`module`: dotted name of the module whose `SANDBOXED` names the tasks; imported by the warm process."""
        self._module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_ready = False
        self.last_spent: Spent | None = None
        """Of the child that ended last: for measurements."""

    def start(self) -> None:
        """Starts the warm process, without waiting until it is warm."""
        with self._lock:
            self._start()

    def run(self, task: str, file: BinaryIO, limits: Limits, **arguments: Any) -> tuple[Any, mmap.mmap | None]:
        """What the task answered, and what it wrote: mapped; None where that is nothing.

        `file` is seekable; its position does not matter and is 0 afterwards. Raises UploadRejected where the task did,
        InvalidImage where the child died of the file, InternalError for a fault of ours in the task, Unavailable where
        no answer came in time or there is no warm process, OSError where the disk has no room for what it wrote.
        """
        output_fd = os.memfd_create("enlarger-output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with _read_only(file) as input_fd:
                said, exit_code = self._ask(task, input_fd, output_fd, limits, arguments)
            answer = _believed(said, exit_code)
            return answer, _mapped(output_fd)
        finally:
            os.close(output_fd)
            file.seek(0)

    def close(self) -> None:
        """Ends the warm process, and with it every child."""
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """Of the warm process; None before it is started."""
        return None if self._process is None else self._process.pid

    def _ask(
        self, task: str, input_fd: int, output_fd: int, limits: Limits, arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Any], int]:
        request = json.dumps([task, arguments, limits.memory_bytes, limits.cpu_seconds, limits.output_bytes]).encode()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._send(request, [theirs.fileno(), input_fd, output_fd])
            theirs.close()
            # Closing our end is what has the warm process kill a child that takes too long.
            return self._heard(ours, limits.wall_seconds)

    def _send(self, request: bytes, fds: list[int]) -> None:
        for _ in range(2):
            control = self._ready_control()
            try:
                socket.send_fds(control, [request], fds)
                return
            except OSError:
                # It has died since it was last asked: another takes its place, once.
                _log().warning("sandbox.lost", module=self._module)
                with self._lock:
                    if self._control is control:
                        self._stop()
        raise Unavailable("The process that reads pictures cannot be reached.", retry_after_seconds=5)

    def _ready_control(self) -> socket.socket:
        with self._lock:
            self._start()
            control = self._control
            assert control is not None
            if not self._is_ready:
                control.settimeout(START_SECONDS)
                try:
                    self._is_ready = control.recv(1) == b"+"
                except OSError:
                    self._is_ready = False
                if not self._is_ready:
                    self._stop()
                    raise Unavailable("The process that reads pictures did not start.", retry_after_seconds=5)
            return control

    def _heard(self, ours: socket.socket, wall_seconds: float) -> tuple[dict[str, Any], int]:
        """The child's line and, behind it, how it ended: the warm process's line."""
        ends_at = time.monotonic() + wall_seconds
        heard = bytearray()
        while (left := ends_at - time.monotonic()) > 0 and len(heard) <= _ANSWER_BYTES:
            ours.settimeout(left)
            try:
                chunk = ours.recv(65536)
            except TimeoutError:
                break
            if not chunk:
                raise Unavailable("The process that reads pictures has died.", retry_after_seconds=5)
            heard += chunk
            *lines, rest = bytes(heard).split(b"\n")
            if not rest and lines and lines[-1].startswith(b"exit "):
                code, cpu_seconds, peak_bytes = lines[-1].split()[1:4]
                self.last_spent = Spent(float(cpu_seconds), int(peak_bytes))
                return _object(lines[0] if len(lines) > 1 else b""), int(code)
        raise Unavailable(f"The picture was not read within {wall_seconds:g} s.", retry_after_seconds=5)

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shared.sandbox", self._module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**_ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])},
            )
        self._control, self._is_ready = ours, False

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            # It ends by itself once the control is closed; one that does not is beyond asking.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self._process.kill()
            self._process.wait()
            self._process = None


def _log() -> BoundLogger:
    # Not at the top: the warm process is this module too, and every child pays for each megabyte it holds.
    from shared.telemetry import log

    return log


@contextlib.contextmanager
def _read_only(file: BinaryIO) -> Iterator[int]:
    """A descriptor of the file's content with a position of its own, which cannot be written by."""
    try:
        file.flush()
        own_fd = file.fileno()
    except (AttributeError, OSError, io.UnsupportedOperation):
        # Kept in memory by whoever has it: a request's small body.
        own_fd = -1
    if own_fd >= 0:
        fd = os.open(f"/proc/self/fd/{own_fd}", os.O_RDONLY | os.O_CLOEXEC)
    else:
        memory_fd = os.memfd_create("enlarger-input", os.MFD_CLOEXEC)
        try:
            file.seek(0)
            with open(memory_fd, "wb", closefd=False) as copy:
                while chunk := file.read(2**20):
                    copy.write(chunk)
            fd = os.open(f"/proc/self/fd/{memory_fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(memory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _mapped(fd: int) -> mmap.mmap | None:
    """The output, its size sealed first: a child that lives on against all rules cannot pull it away from under us.

    A large one moves to a file of this process on disk, without a name: what nobody looks at is then the kernel's cache
    and no memory of ours. Raises OSError where there is no room for it.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    size = os.fstat(fd).st_size
    if size <= KEPT_IN_MEMORY_BYTES:
        return mmap.mmap(fd, size) if size else None
    with tempfile.TemporaryFile() as file:
        moved = 0
        while moved < size:
            moved += os.sendfile(file.fileno(), fd, moved, size - moved)
        return mmap.mmap(file.fileno(), size)


def _object(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line) if line else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _believed(said: Mapping[str, Any], exit_code: int) -> Any:
    """The answer, or the error it stands for. Nothing that a child says can raise anything else."""
    if exit_code == -signal.SIGXCPU:
        raise InvalidImage("The picture takes longer to read than a picture may take.")
    if exit_code == -signal.SIGKILL:
        # Not by us, who would have hung up: the kernel ran out of memory, or a person did it.
        raise Unavailable("The process that reads pictures was killed.", retry_after_seconds=5)
    if exit_code != 0:
        raise InvalidImage("The picture's decoder broke off while reading it.")
    if "answer" in said:
        return said["answer"]
    kinds: list[type[UploadRejected]] = [UploadRejected, *UploadRejected.__subclasses__()]
    for kind in kinds:
        if said.get("error") == kind.__name__:
            facts = said.get("facts")
            raise _rebuilt(kind, str(said.get("detail"))[:1000], facts if isinstance(facts, dict) else {})
    _log().error("sandbox.fault", fault=str(said.get("fault"))[:4000])
    raise InternalError("Reading the picture failed in a way nobody foresaw.")


def _rebuilt(kind: type[EnlargerError], detail: str, facts: dict[str, Any]) -> EnlargerError:
    # Past the class's own constructor: some take the facts and word the detail themselves.
    error = kind.__new__(kind)
    EnlargerError.__init__(error, detail)
    error.facts = facts
    return error


# --- in the warm process --------------------------------------------------------------------------------------------


class _Keeper:
    """The warm process: takes requests, forks, reaps, and kills what nobody waits for any more."""

    def __init__(self, tasks: Mapping[str, Task], control: socket.socket) -> None:
        self._tasks, self._control = tasks, control
        self._calls: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)

    def serve(self) -> None:
        """Until the control's other end is closed, by its owner or by the owner's death."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._control.send(b"+")
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    request, fds, _, _ = socket.recv_fds(self._control, _REQUEST_BYTES, 3)
                    if not request:
                        for pid in self._calls:
                            os.kill(pid, signal.SIGKILL)
                        return
                    self._begin(request, fds)
                elif key.fileobj is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                    self._reap()
                else:
                    self._hung_up(key.data)

    def _begin(self, request: bytes, fds: list[int]) -> None:
        call_fd, input_fd, output_fd = fds
        call = socket.socket(fileno=call_fd)
        pid = os.fork()
        if pid == 0:
            self._be_a_child(request, call, input_fd, output_fd)
        os.close(input_fd)
        os.close(output_fd)
        self._calls[pid] = call
        self._selector.register(call, selectors.EVENT_READ, pid)

    def _hung_up(self, pid: int) -> None:
        # Nobody sends anything here: what can be read is the end. The child is reaped as any other.
        call = self._calls.get(pid)
        if call is not None and call.fileno() >= 0:
            self._selector.unregister(call)
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._calls:
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            call = self._calls.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(call)
            code = os.waitstatus_to_exitcode(status)
            line = f"\nexit {code} {used.ru_utime + used.ru_stime:.4f} {used.ru_maxrss * 1024}\n"
            with call, contextlib.suppress(OSError):
                call.send(line.encode(), socket.MSG_DONTWAIT)

    def _be_a_child(self, request: bytes, call: socket.socket, input_fd: int, output_fd: int) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Of the others it is to know nothing, and their calls must end when they do.
            self._selector.close()
            for other in (self._control, self._woken, self._wake, *self._calls.values()):
                other.close()
            # Libraries grumble there about every odd file.
            silence = os.open(os.devnull, os.O_RDWR)
            os.dup2(silence, sys.stdout.fileno())
            os.dup2(silence, sys.stderr.fileno())
            name, arguments, memory_bytes, cpu_seconds, output_bytes = json.loads(request)
            _confine(memory_bytes, cpu_seconds, output_bytes)
            with open(input_fd, "rb") as file, open(output_fd, "wb", buffering=0) as output:
                said = _said_by(self._tasks[name], file, output, arguments)
            call.sendall(said.encode())
            code = 0
        finally:
            # Without the interpreter's own end: nothing here is to be flushed, joined or cleaned up.
            os._exit(code)


def _said_by(task: Task, file: BinaryIO, output: Any, arguments: Mapping[str, Any]) -> str:
    try:
        return json.dumps({"answer": task(file, output, **arguments)})
    except UploadRejected as error:
        return json.dumps({"error": type(error).__name__, "detail": error.detail, "facts": error.facts})
    except MemoryError:
        refusal = "The picture needs more memory to read than a picture may take."
        return json.dumps({"error": InvalidImage.__name__, "detail": refusal})
    except Exception:  # noqa: BLE001  (a child has nowhere else to tell of it)
        return json.dumps({"fault": traceback.format_exc()[-4000:]})


def _confine(memory_bytes: int, cpu_seconds: int, output_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    addresses = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    # SIGXCPU, which says what it was, and a second later SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output_bytes, output_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_CHILD_FILES, _CHILD_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Becomes the warm process: `python -m shared.sandbox MODULE CONTROL_FD`."""
    module, control_fd = sys.argv[1], int(sys.argv[2])
    # A terminal's ^C and a supervisor's notice go to the whole group; this process ends when its owner does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    named = importlib.import_module(module)
    tasks: Mapping[str, Task] = named.SANDBOXED
    if hasattr(named, "warm_up"):
        named.warm_up()
    # What is there already is never collected, so that children do not copy its pages.
    gc.collect()
    gc.freeze()
    _Keeper(tasks, socket.socket(fileno=control_fd)).serve()


if __name__ == "__main__":
    main()
