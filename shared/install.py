"""Makes `.venv` hold what pyproject.toml pins, so that one command is all the set-up there is.

    python3 -I shared/install.py api worker stack        the extras that the command to come needs

Runs before anything is installed: standard library only, and any Python from 3.7 on can start it, also one too old or
too new to run Enlarger; a fitting one is then looked for. Does nothing, in well under half a second, when what is
asked for is there already. Versions are pyproject.toml's alone: direct ones in [project], what those pull in under
[tool.enlarger], handed to pip as constraints. The user's pip configuration (mirrors, wheel folders) is left in force.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SUPPORTED = ((3, 12), (3, 11))
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
CPU_INDEX_URL = "https://download.pytorch.org/whl/cpu"
INDEX_TIMEOUT_SECONDS = 5.0
# The two are built for each other: a torchvision of one index beside a torch of another fails at import.
PAIR = ("torch", "torchvision")


class SetupFailed(Exception):
    """One sentence for the person at the terminal: what is wrong and what to do."""


def main(argv: list[str]) -> int:
    """Installs the extras named in `argv`. Exit 0 when `.venv` holds them, 1 with a sentence when it cannot."""
    parser = argparse.ArgumentParser(prog="shared/install.py", description="Install Enlarger into .venv.")
    parser.add_argument("extras", nargs="*", help="optional dependencies of pyproject.toml: api, worker, stack, ...")
    parser.add_argument(
        "--only-dependencies",
        action="store_true",
        help="leave Enlarger itself out: a container layer that outlives changes of the source",
    )
    arguments = parser.parse_args(argv)
    try:
        if sys.version_info[:2] not in SUPPORTED:
            python = find_python()
            os.execv(python, [python, "-I", __file__, *argv])
        install(sorted(set(arguments.extras)), only_dependencies=arguments.only_dependencies)
        if not arguments.only_dependencies:
            compile_sources()
    except SetupFailed as failure:
        print(f"\nSet-up failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def find_python() -> str:
    """The path of a Python that runs Enlarger, newest first. Raises SetupFailed where there is none."""
    for major, minor in SUPPORTED:
        found = shutil.which(f"python{major}.{minor}")
        # Started to make sure: version managers put names on PATH that answer only where they are switched on.
        if found and subprocess.run([found, "-I", "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    raise SetupFailed(
        f"Enlarger needs Python 3.11 or 3.12, and only {platform.python_version()} was found. Install one: "
        "`apt-get install python3.11 python3.11-venv` (Debian 12), `apt-get install python3.12 python3.12-venv` "
        "(Ubuntu 24.04), `brew install python@3.12` (macOS), or https://www.python.org/downloads/."
    )


def install(extras: list[str], *, only_dependencies: bool = False) -> None:
    """Brings `.venv` to what pyproject.toml says for `extras`; adds to what is there, removes nothing.

    Raises SetupFailed. If it raises or is interrupted, the next call goes on where this one stopped.
    """
    pyproject = read_pyproject()
    known = pyproject["project"]["optional-dependencies"]
    unknown = set(extras) - set(known)
    if unknown:
        raise SetupFailed(f"pyproject.toml has no extras {sorted(unknown)}; it has {sorted(known)}.")

    stamp = VENV / f".installed-{fingerprint(pyproject)}"
    unfit = why_venv_is_unfit()
    if unfit:
        make_venv(unfit)
    elif stamp.exists() and set(extras) <= set(stamp.read_text().split()):
        return

    pins = pyproject["tool"]["enlarger"]
    constraints = list(pins["constraints"])
    if "worker" in extras:
        version = place_torch(pinned_pair(known["worker"]))
        if "+" not in version:
            constraints += pins["cuda-constraints"]
    constraints_file = VENV / "constraints.txt"
    constraints_file.write_text("".join(f"{line}\n" for line in constraints))

    what = ["-e", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)]
    if only_dependencies:
        what = [*pyproject["project"]["dependencies"], *(line for extra in extras for line in known[extra])]
    print(f"Installing Enlarger's dependencies ({', '.join(extras) or 'the least'}) into {VENV}.", flush=True)
    if pip_install(["-c", str(constraints_file), *what]) != 0:
        raise SetupFailed("pip could not install what pyproject.toml pins; its own words are above.")
    if not only_dependencies:
        already = stamp.read_text().split() if stamp.exists() else []
        for old in VENV.glob(".installed-*"):
            old.unlink()
        stamp.write_text("".join(f"{extra}\n" for extra in sorted({*already, *extras})))


def read_pyproject() -> dict[str, Any]:
    # Imported here: the Pythons that only look for a fitting one need not have it.
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def fingerprint(pyproject: dict[str, Any]) -> str:
    """Changes when an install could come out otherwise; settings of linters and tests do not count."""
    parts = [pyproject["build-system"], pyproject["project"], pyproject["tool"]["enlarger"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def why_venv_is_unfit() -> str:
    """Why `.venv` must be made (again), as the beginning of a sentence; empty where it can be used."""
    if not (VENV / "pyvenv.cfg").exists():
        return "There is no virtual environment yet"
    lines = [line.partition("=") for line in (VENV / "pyvenv.cfg").read_text().splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in lines}
    version = facts.get("version", facts.get("version_info", ""))
    if not any(version.startswith(f"{major}.{minor}.") for major, minor in SUPPORTED):
        return f"{VENV} was made by Python {version or 'of an unknown version'}, and Enlarger needs 3.11 or 3.12"
    if not VENV_PYTHON.exists():
        return f"The Python that {VENV} was made with is gone"
    # The scripts in bin/ begin with the path of the folder they were made in, and fail in any other.
    made_in = re.sub(r"^(--\S+ )*", "", facts.get("command", "").rpartition(" -m venv ")[2])
    if made_in and Path(made_in).resolve() != VENV:
        return f"{VENV} was made as {made_in} and moved or copied here"
    if not any(VENV.glob("lib/python3.*/site-packages/pip")):
        return f"{VENV} is half made, without pip"
    return ""


def make_venv(why: str) -> None:
    print(f"{why}: making {VENV} with Python {platform.python_version()}.", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        version = ".".join(platform.python_version_tuple()[:2])
        raise SetupFailed(
            f"Python {version} at {sys.executable} cannot make virtual environments. Debian and Ubuntu keep that in a "
            f"package of its own: `apt-get install python{version}-venv`."
        )


def pinned_pair(worker_requirements: list[str]) -> dict[str, str]:
    """{"torch": "2.x.y", "torchvision": "0.x.y"} as the `worker` extra pins them."""
    pins = dict(line.split("==") for line in worker_requirements if "==" in line)
    return {name: pins[name] for name in PAIR}


def installed_version(name: str) -> str:
    """Of a package in `.venv`, its local part included ("2.14.1+cpu"); empty where it is not installed."""
    for folder in VENV.glob(f"lib/python3.*/site-packages/{name}-*.dist-info"):
        return folder.name[len(name) + 1 : -len(".dist-info")]
    return ""


def place_torch(pins: dict[str, str]) -> str:
    """Installs torch and torchvision from another index than pip's own where that is better, and says so.

    Returns the version of torch that will be there: with a local part ("+cpu") where it came from such an index,
    without one where the pair is PyPI's and still to be installed with everything else.
    """
    present = {name: installed_version(name) for name in PAIR}
    if all(present[name].partition("+")[0] == pins[name] for name in PAIR):
        return present["torch"]

    wanted = " and ".join(f"{name} {version}" for name, version in pins.items())
    asked_for = os.environ.get("ENLARGER_TORCH_INDEX", "")
    index_url, why = (asked_for, "ENLARGER_TORCH_INDEX says so") if asked_for else better_index(pins)
    if index_url == "pypi":
        index_url = ""

    print(f"Taking {wanted} from {index_url or 'PyPI'}: {why}.", flush=True)
    if not index_url:
        return pins["torch"]
    # Without what they depend on: that comes with everything else, at the versions pinned here.
    requirements = [f"{name}=={version}" for name, version in pins.items()]
    if pip_install(["--no-deps", "--index-url", index_url, *requirements]) == 0:
        return installed_version("torch")
    if asked_for:
        raise SetupFailed(f"{index_url}, which ENLARGER_TORCH_INDEX names, did not give {wanted}.")
    print(f"The CPU index broke off: taking {wanted} from PyPI, several GB.", flush=True)
    return pins["torch"]


def better_index(pins: dict[str, str]) -> tuple[str, str]:
    """(the index to take the pair from, or "pypi"; why, as the end of a sentence). Asks at most one server."""
    if sys.platform != "linux":
        return "pypi", "they are small on this system"
    gpu = nvidia_gpu()
    if gpu:
        return "pypi", f"this machine has an NVIDIA GPU ({gpu}), and these are the CUDA builds"
    refusal = why_index_lacks(pins, CPU_INDEX_URL)
    if refusal:
        several_gb = "These are CUDA builds of several GB; they run on this CPU as well"
        return "pypi", f"PyTorch's CPU index {refusal}. {several_gb}"
    return CPU_INDEX_URL, "no NVIDIA GPU was found, and the CPU builds there are 200 MB, not several GB"


def nvidia_gpu() -> str:
    """What shows that this machine has an NVIDIA GPU; empty where nothing does."""
    signs = [path for path in ("/dev/nvidia0", "/proc/driver/nvidia") if os.path.exists(path)]
    return next(iter(signs), shutil.which("nvidia-smi") or "")


def why_index_lacks(pins: dict[str, str], index_url: str) -> str:
    """Why `index_url` cannot give these versions to this Python, as the end of a sentence; empty where it can.

    One short request a package. The index is a "simple" one: a page of links, each ending in a wheel's file name.
    """
    python = next(VENV.glob("lib/python3.*")).name.replace("python", "")
    python_tag = f"cp{python.replace('.', '')}"
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
    for name, version in pins.items():
        try:
            url = f"{index_url}/{name}/"
            with urllib.request.urlopen(url, timeout=INDEX_TIMEOUT_SECONDS, context=context) as answer:
                page = answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            error.close()
            return f"answers {error.code} to a question for {name}"
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            return f"does not answer ({reason})"
        wheel = rf"{name}-{re.escape(version)}(\+|%2B)\w+-{python_tag}-{python_tag}-\w*{platform.machine()}\.whl"
        if not re.search(wheel, page):
            return f"has no {name} {version} for Python {python} on {platform.machine()}"
    return ""


def compile_sources() -> None:
    """Writes the bytecode of Enlarger itself, as pip does of what it installs; of what has not changed, nothing.

    Python writes it at the first start, but where it may not (a folder that is read-only, PYTHONDONTWRITEBYTECODE) each
    process compiles every module it loads, each time it starts.
    """
    rooms = [str(ROOT / room) for room in ("api", "migrations", "shared", "worker")]
    # What cannot be written or compiled is said by the start that needs it.
    subprocess.run([str(VENV_PYTHON), "-I", "-m", "compileall", "-qq", *rooms], check=False)


def pip_install(arguments: list[str]) -> int:
    """pip's exit status. A progress bar on a terminal; plain lines where a log is kept."""
    quiet = [] if sys.stdout.isatty() else ["--progress-bar", "off"]
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *quiet]
    return subprocess.run([*command, *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
