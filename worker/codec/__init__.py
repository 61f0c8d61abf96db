"""Pictures in and out of the engine. Nothing in here knows of networks, jobs or storage."""

from typing import Any

import numpy.typing as npt

Samples = npt.NDArray[Any]
"""uint8 or uint16, full range."""
