"""The launcher: every process's command line, and the whole service started, hurt, stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from api.client import Client
from shared import keys, stack
from shared.db import Database, clock
from shared.errors import StartFailed
from shared.settings import Settings, load
from shared.stack import Stack
from shared.storage import Storage
from tests.conftest import wait_until

SOURCE = Path(stack.__file__).resolve().parent.parent
PHOTO = SOURCE / "api" / "demo_photo" / "cat.png"


def pids_on(folder: Path) -> list[int]:
    """Living processes whose working folder or environment names this folder: what a stack on it has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            names = (entry / "environ").read_bytes() + os.readlink(entry / "cwd").encode()
        except OSError:
            continue
        if state != "Z" and int(entry.name) != os.getpid() and str(folder).encode() in names:
            found.append(int(entry.name))
    return found


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# --- command lines and settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", stack.PROCESSES)
def test_each_process_is_run_by_this_python(name: str) -> None:
    line = stack.command(name, Settings())
    assert line[:2] == [sys.executable, "-m"]


def test_the_api_has_the_threads_and_processes_it_is_given_and_no_control_socket() -> None:
    line = stack.command("api", Settings(api_threads=7), host="0.0.0.0", port=81, processes=3)
    options = dict(pairwise(line))
    assert options["--bind"] == "0.0.0.0:81"
    assert (options["--threads"], options["--workers"], options["--worker-class"]) == ("7", "3", "gthread")
    assert options["--config"] == "python:api.processes"
    assert "--no-control-socket" in line


def test_an_ipv6_address_is_written_in_brackets() -> None:
    line = stack.command("api", Settings(), host="::1", port=81)
    assert "[::1]:81" in line


def test_only_image_workers_have_sigterm_remapped() -> None:
    assert stack.environ_for("images", {"A": "1"}) == {"A": "1", "REMAP_SIGTERM": "SIGQUIT"}
    assert stack.environ_for("chores", {"A": "1"}) == {"A": "1"}


def test_settings_survive_the_way_through_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given settings of every kind: paths, numbers, truths, lists
    monkeypatch.chdir(tmp_path)
    settings = Settings(
        data_dir=Path("relative"),
        models_dir="weights",
        cookie_secure=True,
        lease_seconds=2.5,
        allow_private_addresses=("127.0.0.1/32", "10.0.0.0/8"),
        webhook_retry_seconds=(0, 1.5),
    )
    # When another process reads them from its environment, in another folder
    for name, value in stack.environ_of(settings).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # Then they are the same, and paths mean the same place.
    here = {"data_dir": tmp_path / "relative", "models_dir": str(tmp_path / "weights")}
    assert load() == settings.model_copy(update=here)


def test_a_process_without_a_secret_key_is_not_started() -> None:
    with pytest.raises(StartFailed, match="ENLARGER_SECRET_KEY"):
        stack.serve("api", Settings(secret_key=""), host="127.0.0.1", port=1, processes=1)


def test_preparing_makes_schema_bucket_and_bootstrap_key_and_can_be_repeated(
    settings: Settings, s3: Any, empty_database_url: str
) -> None:
    secret = "enl_a-key-that-nobody-can-guess"
    wanted = settings.model_copy(
        update={
            "database_url": empty_database_url,
            "storage_endpoint_url": s3.url,
            "storage_bucket": "made-by-prepare",
            "bootstrap_admin_key": secret,
        }
    )
    stack.prepare(wanted)
    stack.prepare(wanted)
    with closing(Database(empty_database_url)) as database, database.transaction() as session:
        assert sorted(keys.authenticate(session, secret, now=clock(session)).scopes) == ["admin", "jobs"]
        assert len(keys.every(session)) == 1
    with closing(Storage(wanted)) as storage:
        storage.ping()


def test_a_long_log_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "LOG_BYTES_KEPT", 10)
    log_path = tmp_path / "api.log"
    log_path.write_text("longer than ten bytes")
    stack.turn_over(log_path)
    assert not log_path.exists()
    assert (tmp_path / "api.log.1").read_text() == "longer than ten bytes"
    log_path.write_text("short")
    stack.turn_over(log_path)
    assert log_path.read_text() == "short"


def test_no_service_runs_on_a_folder_that_nothing_was_started_on(tmp_path: Path) -> None:
    assert stack.running_service(tmp_path) is None


# --- the whole service ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heard() -> list[str]:
    """What the module's stack has told."""
    return []


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, heard: list[str]) -> Iterator[Stack]:
    """A stack of this module's own, which tests may hurt."""
    with Stack(Settings(data_dir=tmp_path_factory.mktemp("stack")), tell=heard.append) as made:
        yield made


def test_a_started_stack_answers_and_leaves_its_address_for_the_command_line(own: Stack) -> None:
    assert answers(f"{own.url}/readyz")
    found = stack.running_service(own.settings.data_dir)
    assert found == {"url": own.url, "api_key": own.api_key, "sign_in_url": own.sign_in_url}
    assert (own.settings.data_dir / stack.SERVICE_FILE).stat().st_mode & 0o077 == 0
    with Client(own.url, own.api_key) as client:
        assert sorted(client.key()["scopes"]) == ["admin", "jobs"]


def test_two_stacks_do_not_share_a_folder(own: Stack) -> None:
    with pytest.raises(StartFailed, match=f"already \\(process {os.getpid()}\\)"):
        Stack(Settings(data_dir=own.settings.data_dir)).start()
    assert answers(f"{own.url}/livez")


def test_a_port_that_is_taken_is_not_fought_over(own: Stack, tmp_path: Path) -> None:
    port = int(own.url.rpartition(":")[2])
    with pytest.raises(StartFailed, match=f"Port {port} is taken"):
        Stack(Settings(data_dir=tmp_path), port=port).start()
    assert pids_on(tmp_path) == []


def test_every_process_that_dies_is_started_again(own: Stack, heard: list[str]) -> None:
    before = {name: own.process(name).pid for name in ("api", "relay", "chores", "redis")}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    for name, pid in before.items():
        wait_until(lambda name=name, pid=pid: own.process(name).pid != pid, seconds=60, what=f"another {name}")
    wait_until(lambda: answers(f"{own.url}/readyz"), seconds=60, what="the service to be ready again")
    assert any(sentence.startswith("api ended (killed by SIGKILL)") for sentence in heard)


def test_what_is_held_stays_dead_until_it_is_released_and_then_has_its_address_again(own: Stack) -> None:
    url = own.settings.redis_url
    own.hold("redis")
    assert own.process("redis").poll() is not None
    own.release("redis")
    assert own.process("redis").poll() is None
    assert own.settings.redis_url == url
    wait_until(lambda: answers(f"{own.url}/readyz"), seconds=60, what="the service to find Redis again")


def test_a_process_that_cannot_live_stops_the_start_and_its_log_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = stack.command

    def command(name: str, settings: Settings, **options: Any) -> list[str]:
        if name == "relay":
            return [sys.executable, "-c", "raise SystemExit('the relay is ill')"]
        return honest(name, settings, **options)

    monkeypatch.setattr(stack, "command", command)
    with pytest.raises(StartFailed, match="the relay is ill"):
        Stack(Settings(data_dir=tmp_path)).start()
    assert pids_on(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_up_killed_outright_leaves_nothing_running_and_loses_nothing(tmp_path: Path) -> None:
    # Given `enlarger up` in a process of its own, and a job done
    program = "from shared.commands import up; up()"
    environ = {**os.environ, "PYTHONPATH": str(SOURCE), "ENLARGER_DATA_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = ""
            while "Stop it with ^C" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            service = stack.running_service(tmp_path) or {}
            assert service["url"] in said
            assert service["api_key"] in said
            with Client(service["url"], service["api_key"]) as client:
                job = client.wait(client.submit(PHOTO, scale=1).id, timeout_seconds=120)
            assert job.succeeded, job.error
        finally:
            # When it is killed
            process.kill()
    # Then all it started ends,
    wait_until(lambda: pids_on(tmp_path) == [], seconds=60, what="every process of the stack to end")
    # and the next time the same key opens the same job, whole.
    with Stack(Settings(data_dir=tmp_path)) as again, Client(again.url, service["api_key"]) as client:
        assert again.api_key == service["api_key"]
        assert client.fetch(job.id, tmp_path / "result.png").stat().st_size == (job.result or {})["bytes"]
    assert pids_on(tmp_path) == []
    assert stack.running_service(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_stack_in_order(number: signal.Signals) -> None:
    from shared.commands import stopped_by_signals

    class Recorded:
        """Stands for a Stack: what is asked of it is all that matters here."""

        def __init__(self) -> None:
            self.asked: list[str] = []

        def stop(self) -> None:
            self.asked.append("stop")
            if self.asked.count("stop") == 1 and "impatient" in self.asked:
                os.kill(os.getpid(), number)

        def kill(self) -> None:
            self.asked.append("kill")

    before = signal.getsignal(number)
    patient = Recorded()
    with stopped_by_signals(patient):  # type: ignore[arg-type]
        os.kill(os.getpid(), number)
        pytest.fail("the signal ends the block")
    assert patient.asked == ["stop"]

    # A second signal, while it is stopping, kills.
    impatient = Recorded()
    with stopped_by_signals(impatient):  # type: ignore[arg-type]
        impatient.asked.append("impatient")
        os.kill(os.getpid(), number)
    assert impatient.asked == ["impatient", "stop", "kill"]
    assert signal.getsignal(number) == before
