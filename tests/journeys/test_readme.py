"""README's examples, run as they are printed against a running service; only a port that must be free is another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from shared.stack import Stack
from tests.conftest import Service, free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
LONGEST_SECONDS = 240


def blocks(language: str, section: str) -> list[str]:
    """The fenced blocks of one section, as printed."""
    text = README.partition(f"## {section}\n")[2].partition("\n## ")[0]
    assert text, f"README has no section {section!r}"
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder such as a reader has: a photograph, a small benchmark, and the virtual environment."""
    with Image.open(ROOT / "api" / "demo_photo" / "cat.png") as cat:
        small = cat.convert("RGB").resize((48, 48), Image.Resampling.LANCZOS)
    small.save(tmp_path / "photo.jpg", quality=95)
    for folder, side_px in (("HR", 48), ("LRx4", 12)):
        (tmp_path / "set5" / folder).mkdir(parents=True)
        small.resize((side_px, side_px), Image.Resampling.BICUBIC).save(tmp_path / "set5" / folder / "cat.png")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@pytest.fixture
def environment(stack: Stack) -> dict[str, str]:
    return {
        **os.environ,
        "ENLARGER_URL": stack.url,
        "ENLARGER_API_KEY": stack.api_key,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def run(command: list[str], script: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [*command, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS
    )
    assert done.returncode == 0, f"{script}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_submit_poll_and_fetch_with_curl(desk: Path, environment: dict[str, str]) -> None:
    export, *examples = blocks("sh", "Use it over HTTP")
    assert "export ENLARGER_URL=" in export
    printed = run(["bash", "-euc"], "\n".join(examples), desk, environment)
    assert '"status":"succeeded"' in printed
    assert size_of(desk / "larger.png") == (192, 192)


def test_the_python_client(desk: Path, environment: dict[str, str]) -> None:
    client = blocks("python", "Use it over HTTP")[0]
    printed = run([sys.executable, "-c"], client, desk, environment)
    assert "%" in printed.splitlines()[-1]
    assert size_of(desk / "larger.jpg") == (192, 192)


def test_the_client_for_asyncio(desk: Path, environment: dict[str, str]) -> None:
    printed = run([sys.executable, "-c"], blocks("python", "Use it over HTTP")[2], desk, environment)
    status, name = printed.split()
    assert status == "succeeded"
    assert size_of(desk / name) == (192, 192)


def test_a_program_written_for_replicate(desk: Path, environment: dict[str, str]) -> None:
    printed = run([sys.executable, "-c"], blocks("python", "Use it over HTTP")[3], desk, environment)
    (desk / "larger.jpg").write_bytes(httpx.get(printed.strip(), trust_env=False).raise_for_status().content)
    assert size_of(desk / "larger.jpg") == (192, 192)


@pytest.fixture
def receiver_port(desk: Path, environment: dict[str, str], service: Service) -> Iterator[int]:
    """README's receiver, running; what it prints goes to `received.txt`."""
    port = free_port()
    script = blocks("python", "Use it over HTTP")[1].replace("9000", str(port))
    answer = httpx.get(
        f"{environment['ENLARGER_URL']}/v1/key",
        headers={"Authorization": f"Bearer {environment['ENLARGER_API_KEY']}"},
        trust_env=False,
    )
    secret = answer.raise_for_status().json()["webhook_secret"]
    with (desk / "received.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=desk,
            env={**environment, "ENLARGER_WEBHOOK_SECRET": secret},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield port
        finally:
            process.kill()
            process.wait()


def test_the_webhook_receiver(desk: Path, service: Service, receiver_port: int) -> None:
    job = service.submit((desk / "photo.jpg").read_bytes(), webhook_url=f"http://127.0.0.1:{receiver_port}/")
    received = desk / "received.txt"
    wait_until(
        lambda: f"job.succeeded {job['id']}" in received.read_text(), seconds=60, what="the receiver to print the event"
    )


def test_the_command_line(desk: Path, environment: dict[str, str]) -> None:
    printed = run(["bash", "-eux", "-c"], blocks("sh", "Use it from the command line")[0], desk, environment)
    assert "srresnet" in printed
    assert size_of(desk / "larger.jpg") == size_of(desk / "larger.png") == (192, 192)


def test_the_table_of_models_lists_every_card_with_its_licence() -> None:
    from shared.catalog import CARDS

    table = README.partition("## Models\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| ([^|]*?) ?\|", table, re.MULTILINE)
    assert rows == [("bicubic-matlab", ""), *((card.name, card.licence) for card in CARDS)]
