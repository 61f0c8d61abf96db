"""Settings are read once, from the environment or from files it names, and documented where they are declared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.settings import ENV_PREFIX, Settings, load, table

ROOT = Path(__file__).resolve().parents[2]


def test_every_setting_has_a_sentence() -> None:
    silent = [
        name for name, declared in Settings.model_fields.items() if not (declared.description or "").endswith(".")
    ]
    assert silent == []


def test_the_table_in_the_docs_is_what_the_class_says() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "shared.settings"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    committed = (ROOT / "docs" / "settings.md").read_text()
    assert committed == printed, "run `python -m shared.settings > docs/settings.md`"
    assert printed == table()
    assert all(f"`{ENV_PREFIX}{name.upper()}`" in printed for name in Settings.model_fields)


def test_defaults_are_those_of_the_contract() -> None:
    settings = load({})
    assert settings.max_upload_bytes == 100_000_000
    assert settings.max_input_px == 50_000_000
    assert settings.max_output_px == 1_000_000_000
    assert settings.max_queued_jobs_per_key == 1000
    assert settings.max_wait_seconds == 60
    assert settings.result_ttl_seconds == 7 * 86400
    assert settings.idempotency_ttl_seconds == 86400
    assert (settings.lease_seconds, settings.lease_renew_seconds, settings.rescue_interval_seconds) == (20, 5, 2)
    assert settings.max_attempts == 3
    assert settings.webhook_timeout_seconds == 15
    hour = 3600
    assert settings.webhook_retry_seconds == (
        0, 5, 300, 1800, 2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour,
    )  # fmt: skip


def test_a_variable_sets_its_setting() -> None:
    settings = load(
        {
            "ENLARGER_LEASE_SECONDS": "1.5",
            "ENLARGER_ALLOW_PRIVATE_ADDRESSES": '["127.0.0.0/8"]',
            "ENLARGER_COOKIE_SECURE": "true",
            "ENLARGER_DATA_DIR": "/somewhere",
            "UNRELATED": "1",
            "LEASE_SECONDS": "99",
        }
    )
    assert settings.lease_seconds == 1.5
    assert settings.allow_private_addresses == ("127.0.0.0/8",)
    assert settings.cookie_secure is True
    assert settings.sqlalchemy_url == "sqlite:////somewhere/enlarger.db"


def test_load_reads_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENLARGER_MAX_ATTEMPTS", "7")
    assert load().max_attempts == 7
    assert load({}).max_attempts == 3


def test_settings_made_in_code_do_not_look_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENLARGER_MAX_ATTEMPTS", "7")
    assert Settings().max_attempts == 3


def test_a_secret_can_be_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from the file\n")
    settings = load({"ENLARGER_SECRET_KEY": "from the variable", "ENLARGER_SECRET_KEY_FILE": str(tmp_path / "secret")})
    assert settings.secret_key == "from the file"


def test_any_setting_can_be_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "blocks").write_text('["10.0.0.0/8"]\n')
    (tmp_path / "lease").write_text("3\n")
    settings = load(
        {
            "ENLARGER_ALLOW_PRIVATE_ADDRESSES_FILE": str(tmp_path / "blocks"),
            "ENLARGER_LEASE_SECONDS_FILE": str(tmp_path / "lease"),
        }
    )
    assert settings.allow_private_addresses == ("10.0.0.0/8",)
    assert settings.lease_seconds == 3


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        load({"ENLARGER_SECRET_KEY_FILE": str(tmp_path / "missing")})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MAX_ATTEMPTS", "many"),
        ("MAX_ATTEMPTS", "0"),
        ("LEASE_SECONDS", "-1"),
        ("WORKER_DEVICE", "tpu"),
        ("RESULT_DELIVERY", "pigeon"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_of_its_setting(variable: str, value: str) -> None:
    with pytest.raises(ValidationError, match=variable.lower()):
        load({ENV_PREFIX + variable: value})


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.max_attempts = 9  # type: ignore[misc]


def test_secrets_do_not_show_in_a_print_of_the_settings() -> None:
    settings = Settings(
        secret_key="s3cret-1",
        storage_secret_key="s3cret-2",
        bootstrap_admin_key="s3cret-3",
        database_url="postgresql+psycopg://enlarger:s3cret-4@host/name",
        redis_url="redis://:s3cret-5@host/0",
    )
    assert "s3cret" not in repr(settings)
    assert "s3cret" not in str(settings)


def test_an_empty_database_url_is_sqlite_in_the_data_folder(tmp_path: Path) -> None:
    assert Settings(data_dir=tmp_path).sqlalchemy_url == f"sqlite:///{tmp_path}/enlarger.db"
    named = "postgresql+psycopg://u:p@h/n"
    assert Settings(data_dir=tmp_path, database_url=named).sqlalchemy_url == named
