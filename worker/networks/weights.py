"""Weights are read in one way: out of an installed package, and only after their hash is right."""

from __future__ import annotations

import hashlib
import importlib.resources
from pathlib import Path

from shared.catalog import OwnFile, WeightsSource
from shared.errors import ModelUnavailable


def read_verified(source: WeightsSource | OwnFile) -> bytes:
    """The file's bytes, whose sha256 is `source.sha256`. Nothing is downloaded.

    Raises ModelUnavailable, with what was expected and what was found, if the package or the file is missing or the
    bytes are not those the catalogue names.
    """
    if isinstance(source, OwnFile):
        return _read_own(source)
    facts = {"package": source.package, "path": source.path, "expected_sha256": source.sha256}
    try:
        content = (importlib.resources.files(source.package) / source.path).read_bytes()
    except ModuleNotFoundError as error:
        raise ModelUnavailable(
            f"The package {source.package}, which carries the weights, is not installed.", **facts
        ) from error
    except OSError as error:
        raise ModelUnavailable(f"The package {source.package} has no readable file {source.path}.", **facts) from error
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise ModelUnavailable(
            f"The weights {source.package}/{source.path} are not those of the catalogue: their sha256 differs.",
            found_sha256=found,
            **facts,
        )
    return content


def _read_own(source: OwnFile) -> bytes:
    name = Path(source.path).name
    try:
        content = Path(source.path).read_bytes()
    except OSError as error:
        raise ModelUnavailable(f"The file {name} in ENLARGER_MODELS_DIR cannot be read.", file=name) from error
    if hashlib.sha256(content).hexdigest() != source.sha256:
        raise ModelUnavailable(f"The file {name} has changed since this worker started: restart it.", file=name)
    return content
