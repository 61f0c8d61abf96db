"""The schema's history. `enlarger migrate` brings a database to the newest revision."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config


def upgrade(url: str, revision: str = "head") -> None:
    """Brings the database at `url` to `revision`; does nothing where it is there already."""
    command.upgrade(config(url), revision)


def config(url: str) -> Config:
    """Alembic's configuration without an ini file: the URL comes from the settings, the scripts lie here."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    # ConfigParser would take a % in a password for an interpolation.
    made.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return made
