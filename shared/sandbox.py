"""Strangers' files are read in a process of their own, which holds nothing and may use little.

A decoder is much C code fed with bytes of somebody else's choosing: it may crash, eat memory, never end, or do what the
bytes say. So it runs in a child, made for this one file, with limits on memory, processor time, open files and written
bytes, with no secret in its environment and no connection but the one it answers by. What becomes of the child is the
file's fault and harms nobody.

Of a task that takes less time than making a child, the caller may say whose the file is. A child that has answered such
a question without any fault then stays for the same owner's next file, never for another's, and for a while only. If a
file has taken it over, what it can spoil are answers about that owner's own files; and it can refuse none, since
whatever is not a plain answer of such a child is asked again of one made for this file.

One warm process imports the decoders once and forks such a child for each file, which takes some milliseconds where a
fresh interpreter takes half a second:

    Sandbox.run --(task, read-only file, empty output)--> warm process --fork--> child: limits, then the task
        ^-------------------- a line of JSON; pixels and the like in the output, by shared memory ------'
        '--(the same owner's next file)--> child that has stayed

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
from dataclasses import dataclass, replace
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
STAYS_FOR_FILES = 100
"""After so many of its owner's files a child ends, however well it did: what it was given to hold stays little."""
STAYS_IDLE_SECONDS = 5.0
STAYING_CHILDREN = 16
"""At once, each some megabytes; the one that has waited longest goes first."""
_REQUEST_BYTES = 64 * 1024
_ANSWER_BYTES = 2**20
_CHILD_FILES = 64
# One thread each: the child's memory is counted in addresses, of which every thread takes many.
_ANSWERED = '{"answer": '
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


@dataclass(frozen=True)
class _Stayed:
    """This side of a child that has answered well and waits for its owner's next file."""

    owner: str
    limits: Limits
    call: socket.socket
    """Its answers; closing it is what has the warm process kill it."""
    requests: socket.socket
    files_left: int

    def hang_up(self) -> None:
        self.call.close()
        self.requests.close()


class Sandbox:
    """One warm process and the children it makes. Thread-safe; starts with the first file, or with `start`."""

    def __init__(self, module: str) -> None:
        """`module`: dotted name of the module whose `SANDBOXED` names the tasks; imported by the warm process."""
        self._module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_ready = False
        self._stayed: list[_Stayed] = []
        self.last_spent: Spent | None = None
        """Of the child that ended last: for measurements."""

    def start(self) -> None:
        """Starts the warm process, without waiting until it is warm."""
        with self._lock:
            self._start()

    def run(
        self, task: str, file: BinaryIO, limits: Limits, *, owner: str | None = None, **arguments: Any
    ) -> tuple[Any, mmap.mmap | None]:
        """What the task answered, and what it wrote: mapped; None where that is nothing.

        `owner` is whose file it is, for a task that writes nothing: a child that has read another of theirs well, by
        the same limits, may read this one. Without it the child is made for this file alone. `file` is seekable; its
        position does not matter and is 0 afterwards.

        Raises UploadRejected where the task did, InvalidImage where the child died of the file, InternalError for a
        fault of ours in the task, Unavailable where no answer came in time or there is no warm process, OSError where
        the disk has no room for what it wrote.
        """
        assert owner is None or limits.output_bytes == 0, "what a child that stays has written, it could still change"
        request = json.dumps([task, arguments, limits.memory_bytes, limits.cpu_seconds, limits.output_bytes]).encode()
        output_fd = os.memfd_create("enlarger-output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            if owner is not None:
                with _read_only(file) as input_fd:
                    told = self._ask_one_that_stayed(owner, request, [input_fd, output_fd], limits)
                if told is not None:
                    return told["answer"], None
            # Opened anew: the other child may still have it, and with it the place that is read from.
            with _read_only(file) as input_fd:
                said, exit_code = self._ask(owner, request, [input_fd, output_fd], limits)
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

    def _ask(self, owner: str | None, request: bytes, fds: list[int], limits: Limits) -> tuple[dict[str, Any], int]:
        """What a child made for this file says, and how it ended; 0 where it stays."""
        with contextlib.ExitStack() as closing:
            ours, theirs = (closing.enter_context(end) for end in socket.socketpair())
            fds = [theirs.fileno(), *fds]
            if owner is not None:
                requests, heard = (
                    closing.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                )
                fds.append(heard.fileno())
            self._send(request, fds)
            theirs.close()
            # Closing our end is what has the warm process kill a child that takes too long.
            said, exit_code = self._heard(ours, limits.wall_seconds, stays=owner is not None)
            if owner is not None and exit_code is None:
                heard.close()
                closing.pop_all()
                self._let_stay(_Stayed(owner, limits, ours, requests, STAYS_FOR_FILES - 1))
            return said, exit_code or 0

    def _ask_one_that_stayed(self, owner: str, request: bytes, fds: list[int], limits: Limits) -> dict[str, Any] | None:
        """The plain answer of a child that has read another file of this owner's; None where there is none, or where
        it came to anything else: that is for a child of this file's own to say. Raises Unavailable where none came in
        time."""
        child = self._one_that_stayed(owner, limits)
        if child is None:
            return None
        try:
            socket.send_fds(child.requests, [request], fds)
            said, exit_code = self._heard(child.call, limits.wall_seconds, stays=True)
        except OSError:
            # It has waited long enough and gone.
            exit_code = -1
        except Unavailable:
            child.hang_up()
            raise
        if exit_code is not None:
            child.hang_up()
            return None
        self._let_stay(replace(child, files_left=child.files_left - 1))
        return said

    def _one_that_stayed(self, owner: str, limits: Limits) -> _Stayed | None:
        with self._lock:
            # Without the warm process there is nobody to kill a child that takes too long.
            if self._process is None or self._process.poll() is not None:
                return None
            # The one that has waited least: the others go in time, and their memory with them.
            for place in reversed(range(len(self._stayed))):
                if (self._stayed[place].owner, self._stayed[place].limits) == (owner, limits):
                    return self._stayed.pop(place)
        return None

    def _let_stay(self, child: _Stayed) -> None:
        if child.files_left <= 0:
            child.hang_up()
            return
        with self._lock:
            self._stayed.append(child)
            longest = self._stayed.pop(0) if len(self._stayed) > STAYING_CHILDREN else None
        if longest is not None:
            longest.hang_up()

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

    def _heard(self, ours: socket.socket, wall_seconds: float, *, stays: bool) -> tuple[dict[str, Any], int | None]:
        """The child's line and, behind it, how it ended: the warm process's line. None where it `stays` and has
        answered. Raises Unavailable."""
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
            if stays and not rest and len(lines) == 1 and "answer" in (said := _object(lines[0])):
                return said, None
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
        while self._stayed:
            self._stayed.pop().hang_up()
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
                    request, fds, _, _ = socket.recv_fds(self._control, _REQUEST_BYTES, 4)
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
        call = socket.socket(fileno=fds.pop(0))
        pid = os.fork()
        if pid == 0:
            self._be_a_child(request, call, fds)
        for fd in fds:
            os.close(fd)
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

    def _be_a_child(self, request: bytes, call: socket.socket, fds: list[int]) -> NoReturn:
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
            input_fd, output_fd, *requests = fds
            _confine(*json.loads(request)[2:])
            said = self._said(request, input_fd, output_fd)
            if requests:
                with socket.socket(fileno=requests[0]) as more:
                    said = self._stay(said, call, more)
            call.sendall(said.encode())
            code = 0
        finally:
            # Without the interpreter's own end: nothing here is to be flushed, joined or cleaned up.
            os._exit(code)

    def _said(self, request: bytes, input_fd: int, output_fd: int) -> str:
        name, arguments, *_ = json.loads(request)
        with open(input_fd, "rb") as file, open(output_fd, "wb", buffering=0) as output:
            return _said_by(self._tasks[name], file, output, arguments)

    def _stay(self, said: str, call: socket.socket, more: socket.socket) -> str:
        """Answers one file after the other, by the limits it has, until one of them is not simply answered or none
        comes any more. What is to be said last."""
        more.settimeout(STAYS_IDLE_SECONDS)
        while said.startswith(_ANSWERED):
            call.sendall(f"{said}\n".encode())
            try:
                request, fds, _, _ = socket.recv_fds(more, _REQUEST_BYTES, 2)
            except TimeoutError:
                return ""
            if not request:
                return ""
            said = self._said(request, *fds)
        return said


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
