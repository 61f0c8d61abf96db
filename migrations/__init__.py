"""The schema's history. `enlarger migrate` brings a database to the newest revision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alembic.config import Config


def newest() -> str:
    """The revision that this code is written for. Asks no database and loads no revision: their files are numbered."""
    return max(path.name for path in (Path(__file__).parent / "versions").glob("[0-9]*.py")).partition("_")[0]


def upgrade(url: str, revision: str = "head") -> None:
    """Brings the database at `url` to `revision`; does nothing where it is there already."""
    # Not at the top, here and below: the API only asks for the newest, and templates would be a fifth of its start.
    from alembic import command

    command.upgrade(config(url), revision)


def config(url: str) -> Config:
    """Alembic's configuration without an ini file: the URL comes from the settings, the scripts lie here."""
    from alembic.config import Config

    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    # ConfigParser would take a % in a password for an interpolation.
    made.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return made
