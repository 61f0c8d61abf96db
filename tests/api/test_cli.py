"""The command line: what it prints, where it prints it, and with which status it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points, packages_distributions, requires
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from api.cli import COMMANDS_GROUP, main
from shared.doctor import EXTRAS
from shared.stack import Stack
from tests.conftest import Receiver, Reply, closed_port

SOURCE = Path(__file__).resolve().parent.parent.parent
PHOTO = SOURCE / "api" / "demo_photo" / "cat.png"
# The contract's last section, less `train`, which is another issue's.
CONTRACT = ("up", "submit", "status", "fetch", "cancel", "jobs", "models", "upscale", "classify", "evaluate", "bench")
CONTRACT_OF_OPERATORS = ("keys", "doctor")


class Ran:
    """What one run of `enlarger` came to."""

    def __init__(self, result: Result) -> None:
        self.status = result.exit_code
        self.out = result.stdout
        self.err = result.stderr
        self.error = result.exception

    @property
    def json(self) -> Any:
        """The one document on standard output; anything else there fails the test."""
        return json.loads(self.out)


@pytest.fixture
def enlarger(tmp_path: Path) -> Any:
    """Runs `enlarger` with these words, as from a shell whose environment knows no service."""

    def run(*words: str | Path, **environ: str) -> Ran:
        unset = {name: None for name in os.environ if name.startswith("ENLARGER_")}
        env = {**unset, "ENLARGER_DATA_DIR": str(tmp_path / "data"), **environ}
        return Ran(CliRunner().invoke(main, [str(word) for word in words], env=env, prog_name="enlarger"))

    return run


@pytest.fixture
def served(enlarger: Any, stack: Stack) -> Any:
    """Runs `enlarger` against the whole service."""

    def run(*words: str | Path) -> Ran:
        ran: Ran = enlarger(*words, ENLARGER_URL=stack.url, ENLARGER_API_KEY=stack.api_key)
        return ran

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two small pictures of one name, in two folders."""
    made = [tmp_path / folder / "bird.png" for folder in ("a", "b")]
    for path, color in zip(made, ("teal", "orange"), strict=True):
        path.parent.mkdir()
        Image.new("RGB", (20, 12), color).save(path)
    return made


# --- help -----------------------------------------------------------------------------------------------------------


def test_every_command_of_the_contract_is_there_and_explains_itself(enlarger: Any) -> None:
    listed = enlarger("--help").out
    for name in (*CONTRACT, *CONTRACT_OF_OPERATORS):
        assert f"\n  {name} " in listed
        shown = enlarger(name, "--help")
        assert shown.status == 0
        assert shown.out.startswith("Usage: enlarger ")


def test_every_plugged_in_command_can_be_loaded() -> None:
    found = list(entry_points(group=COMMANDS_GROUP))
    assert found, "the project is not installed: `make test` installs it"
    assert all(isinstance(entry.load(), click.Command) for entry in found)


def test_help_loads_no_room_of_the_service() -> None:
    program = (
        "import sys; from api.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'flask', 'sqlalchemy', 'celery', 'boto3', 'pydantic', 'httpx', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=SOURCE, check=True)
    assert ran.stderr.strip() == "[]"


def test_a_misspelt_command_is_wrong_use_and_the_right_one_is_named(enlarger: Any) -> None:
    ran = enlarger("submti")
    assert ran.status == 2
    assert "Did you mean 'submit'?" in ran.err


def test_a_command_whose_packages_are_missing_names_the_extra_that_brings_them() -> None:
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'numpy', 'h5py', 'pyvips']))\n"
        "from api.cli import main\n"
        f"main(['classify', {str(PHOTO)!r}])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=SOURCE, check=False)
    assert ran.returncode == 1
    assert "pip install 'enlarger[worker]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_each_extra_is_known_by_the_packages_that_it_brings() -> None:
    brought = packages_distributions()
    for extra, modules in EXTRAS.items():
        wanted = {
            re.split(r"[^a-z0-9-]", line.lower())[0]
            for line in requires("enlarger") or ()
            if re.search(f"extra == ['\"]{extra}['\"]", line)
        }
        assert {name.lower() for module in modules for name in brought[module]} == wanted


# --- without a service ----------------------------------------------------------------------------------------------


def test_without_a_service_it_is_said_how_to_get_one(enlarger: Any) -> None:
    ran = enlarger("jobs", "--json")
    assert ran.status == 2
    assert ran.out == ""
    assert "enlarger up" in ran.err


def test_a_service_that_does_not_answer_is_a_failure(enlarger: Any) -> None:
    # A problem and not an outage: an outage would be waited for.
    with Receiver() as receiver:
        receiver.pages["/v1/models"] = refusal(401, "unauthorized", "The API key is not known.")
        ran = enlarger("models", ENLARGER_URL=receiver.url, ENLARGER_API_KEY="enl_wrong")
    assert ran.status == 1
    assert ran.err == "Error: The API key is not known. [unauthorized]\n"


def refusal(status: int, code: str, detail: str) -> Reply:
    body = json.dumps({"status": status, "code": code, "detail": detail, "title": "No"}).encode()
    return Reply(status, {"Content-Type": "application/problem+json"}, body)


def test_options_the_contract_does_not_know_are_wrong_use(enlarger: Any) -> None:
    for words in (["--scale", "17"], ["--format", "bmp"], ["--alpha", "none"], ["--colour", "red"]):
        assert enlarger("submit", PHOTO, *words).status == 2
    assert enlarger("submit", "no-such-file.png").status == 2
    assert enlarger("submit").status == 2


def test_many_pictures_are_not_saved_into_one_file(enlarger: Any, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"a file that is there")
    ran = enlarger("submit", PHOTO, PHOTO, "-o", tmp_path / "one.png")
    assert ran.status == 2
    assert "folder" in ran.err


# --- with a service -------------------------------------------------------------------------------------------------


def test_a_picture_is_submitted_followed_saved_and_described(served: Any, pictures: list[Path], tmp_path: Path) -> None:
    ran = served("submit", pictures[0], "-o", tmp_path / "out" / "large.png", "--scale", "2", "--classify", "--json")
    assert ran.status == 0, ran.err
    assert ran.json["picture"] == str(pictures[0])
    assert ran.json["job"]["status"] == "succeeded"
    assert len(ran.json["job"]["labels"]) == 5
    with Image.open(ran.json["path"]) as result:
        assert result.size == (40, 24)


def test_results_of_one_name_do_not_overwrite_each_other(served: Any, pictures: list[Path], tmp_path: Path) -> None:
    ran = served("submit", *pictures, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    saved = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in saved] == ["bird-srgan-x4-2.png", "bird-srgan-x4.png"]
    assert all(str(path) in ran.out for path in saved)


def test_one_bad_picture_among_good_ones_fails_alone(served: Any, pictures: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture at all")
    ran = served("submit", bad, pictures[0], "--json")
    assert ran.status == 1
    refused, taken = ran.json
    assert refused["error"]["code"] == "unsupported-format"
    assert refused["job"] is None
    assert taken["job"]["status"] in ("queued", "running", "succeeded")


def test_a_job_goes_through_every_command(served: Any, pictures: list[Path], tmp_path: Path) -> None:
    job_id = served("submit", pictures[0], "--external-id", "through-all").out.strip()
    fetched = served("fetch", job_id, "-o", tmp_path / "out", "--wait", "--json")
    assert fetched.status == 0, fetched.err
    assert Path(fetched.json["path"]).stat().st_size == fetched.json["bytes"]

    assert served("status", job_id, "--json").json["id"] == job_id
    assert "80 x 48 png" in served("status", job_id).out
    assert [job["id"] for job in served("jobs", "--external-id", "through-all", "--json").json] == [job_id]
    assert job_id in served("jobs", "--status", "succeeded").out

    original = served("fetch", job_id, "--input", "-o", tmp_path / "original.png")
    assert original.status == 0
    assert (tmp_path / "original.png").read_bytes() == pictures[0].read_bytes()

    refused = served("cancel", job_id, "--json")
    assert refused.status == 1
    assert refused.json["error"]["code"] == "job-not-cancelable"
    assert served("retry", job_id).status == 1

    assert served("delete", job_id).status == 0
    gone = served("status", job_id, "--json")
    assert (gone.status, gone.out) == (1, "")
    assert "[not-found]" in gone.err


def test_a_preview_shows_a_crop_by_each_model_and_a_report_says_how_true_a_result_is(
    served: Any, pictures: list[Path], tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.png"
    words = ("preview", pictures[0], "-o", sheet, "--models", "srgan,fsrcnn,lanczos", "--crop", "2,2,12,8")
    ran = served(*words, "--json")
    assert ran.status == 0, ran.err
    cells = ran.json["job"]["preview"]["cells"]
    assert [cell["model"] for cell in cells] == ["srgan", "fsrcnn", "lanczos"]
    with Image.open(sheet) as image:
        for cell in cells:
            box = (cell["x"], cell["y"], cell["x"] + cell["width"], cell["y"] + cell["height"])
            colour = np.asarray(image.crop(box)).mean(axis=(0, 1))
            # Teal, by whichever network.
            assert np.abs(colour - (0, 128, 128)).max() < 30, cell
    assert str(sheet) in served(*words).out
    wrong = served("preview", pictures[0], "-o", sheet, "--crop", "1,2,3")
    assert wrong.status == 1
    assert "crop" in wrong.err
    assert served("preview", pictures[0], "--crop", "a,b").status == 2

    job_id = served("submit", PHOTO, "--model", "auto", "--wait", "--json").json["job"]["id"]
    job = served("status", job_id, "--json").json
    assert job["model"] == "srgan"
    assert "like a photograph" in job["routing"]["reason"]
    report = served("report", job_id, "--json").json
    assert report["job_id"] == job_id
    assert report["colour_difference"] < 5
    assert "psnr db" in served("report", job_id).out


def test_models_are_listed(served: Any) -> None:
    assert {"srgan", "srresnet"} <= {model["name"] for model in served("models", "--json").json}
    assert "Apache-2.0" in served("models").out


# --- this machine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def migrated(enlarger: Any) -> Any:
    """Runs `enlarger` on a data folder with an empty database."""
    assert enlarger("migrate").status == 0
    return enlarger


def test_keys_are_made_listed_and_revoked(migrated: Any) -> None:
    made = migrated("keys", "create", "a robot", "--scope", "jobs", "--days", "2", "--json").json
    assert made["api_key"].startswith("enl_")
    assert made["scopes"] == ["jobs"]
    assert made["expires_at"] is not None
    assert migrated("keys", "create", "a person").out.startswith("enl_")

    assert [key["name"] for key in migrated("keys", "list", "--json").json] == ["a person", "a robot"]
    listed = migrated("keys", "list").out
    assert "a robot" in listed
    assert made["api_key"] not in listed

    rotated = migrated("keys", "rotate", made["id"], "--hours", "2", "--json").json
    assert rotated["id"] == made["id"]
    assert rotated["api_key"] not in (made["api_key"], None)
    assert rotated["previous_ends_at"] is not None
    assert "works until" in migrated("keys", "rotate", made["id"]).out
    assert "dead" in migrated("keys", "rotate", made["id"], "--hours", "0").out
    assert migrated("keys", "rotate", "key_unknown").status == 1

    assert migrated("keys", "revoke", made["id"]).status == 0
    assert migrated("keys", "rotate", made["id"]).status == 2
    assert "revoked" in migrated("keys", "list").out
    assert migrated("keys", "revoke", "key_unknown").status == 1


def test_keys_without_a_database_say_where_it_was_looked_for(enlarger: Any, tmp_path: Path) -> None:
    ran = enlarger("keys", "list")
    assert ran.status == 1
    assert str(tmp_path / "data") in ran.err


def test_a_sign_in_link_is_for_a_key_that_is_good(migrated: Any) -> None:
    made = migrated("keys", "create", "me", "--json").json
    link = migrated(
        "sign-in", "--key", made["id"], ENLARGER_SECRET_KEY="a secret", ENLARGER_URL="https://enlarger.example"
    )
    assert link.out.startswith("https://enlarger.example/sign-in?token=")
    assert migrated("sign-in", "--key", "key_unknown", ENLARGER_SECRET_KEY="a secret").status == 2
    assert migrated("sign-in", ENLARGER_SECRET_KEY="a secret").status == 2
    assert migrated("sign-in").status == 1


def test_settings_that_are_wrong_are_named(enlarger: Any) -> None:
    ran = enlarger("migrate", ENLARGER_LEASE_SECONDS="soon")
    assert ran.status == 2
    assert "ENLARGER_LEASE_SECONDS" in ran.err


def test_the_doctor_finds_this_machine_well(migrated: Any) -> None:
    ran = migrated("doctor", "--json")
    assert ran.status == 0, ran.out
    states = {finding["name"]: finding["state"] for finding in ran.json["findings"]}
    assert ran.json["ok"]
    for name in ("python", "torch", "weights of srgan", "redis", "storage", "sql", "disk"):
        assert states[name] == "ok"
    assert states["service"] == "optional"


def test_the_doctor_names_a_model_of_ones_own_that_is_broken(migrated: Any, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "broken.pth").write_bytes(b"no model")
    # Redis is looked for first, and is the stack's business.
    ran = migrated("doctor", "--json", ENLARGER_MODELS_DIR=str(folder))
    found = {finding["name"]: finding for finding in ran.json["findings"]}
    mine = found["models of your own"]
    assert (ran.status, mine["state"]) == (1, "missing")
    assert mine["detail"].startswith("broken.pth: Neither safetensors nor a file of torch's")
    assert "the other models work without them" in mine["remedy"]
    assert found["weights of srgan"]["state"] == "ok"


def test_the_doctor_says_what_does_not_answer_and_what_to_do(enlarger: Any) -> None:
    ran = enlarger("doctor", ENLARGER_REDIS_URL=f"redis://127.0.0.1:{closed_port()}/0")
    assert ran.status == 1
    assert "MISSING  redis" in ran.out
    assert "correct ENLARGER_REDIS_URL" in ran.out


def test_a_process_that_lacks_its_secret_is_not_served(enlarger: Any) -> None:
    ran = enlarger("serve", "api")
    assert ran.status == 1
    assert "ENLARGER_SECRET_KEY" in ran.err
    assert enlarger("serve", "everything").status == 2


@pytest.mark.slow
def test_the_demo_shows_the_main_job_and_stops_everything(tmp_path: Path) -> None:
    program = "from api.demo import demo; demo()"
    ran = subprocess.run(
        [sys.executable, "-c", program, "--output", str(tmp_path / "shown")],
        capture_output=True,
        text=True,
        cwd=SOURCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for words in ("192 x 192 -> 768 x 768 px", "job.succeeded, signature verified", "cat"):
        assert words in ran.stdout
    for name in ("result.png", "bicubic.png", "comparison.png"):
        with Image.open(tmp_path / "shown" / name) as picture:
            assert picture.size == (768, 768)
    assert (tmp_path / "shown" / "input.png").read_bytes() == PHOTO.read_bytes()
    assert not (tmp_path / "shown" / ".stack" / "service.json").exists()


def test_the_photograph_comes_with_its_origin() -> None:
    origin = PHOTO.with_name("ORIGIN.md").read_text()
    assert "CC0" in origin
    assert "Stéfan van der Walt" in origin
    assert PHOTO.stat().st_size < 100_000
