"""What `model=auto` comes to: a card by what the picture is, and a sentence that says why.

    tiny        at most TINY_PX on its longer side      real-esrgan         thumbnails are mostly worn by JPEG
    text-like   one background, and many hard steps     srresnet            letters must not be invented
    drawing     flat colours with hard steps between    real-esrgan-anime   trained on such
    photograph  everything else                         srgan               the sharpest look

Looked at are the steps between neighbouring px in the middle of the picture, at its own size: in photographs most are
soft, in drawings and text most are none or hard. How often the rule is right is in `tests/worker/test_routing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TINY_PX = 96
SEEN_PX = 512
"""Side of the square in the middle that is looked at: a few milliseconds."""

# Steps between neighbours, in levels of 255 of the channel that differs most.
FLAT_LEVELS, SOFT_LEVELS, HARD_LEVELS = 2, 24, 64
NEAR_LEVELS = 12
TEXT_LEAST_BACKGROUND, TEXT_LEAST_HARD = 0.4, 0.04
DRAWING_LEAST_FLAT, DRAWING_MOST_SOFT, DRAWING_LEAST_HARD = 0.6, 0.2, 0.01


@dataclass(frozen=True)
class Route:
    model: str
    reason: str


def choose(image: NDArray[Any]) -> Route:
    """image: (H, W, 3) uint8 or uint16."""
    height, width = image.shape[:2]
    if max(height, width) <= TINY_PX:
        return Route(
            "real-esrgan",
            f"auto: a tiny picture, {width} x {height} px; real-esrgan takes away what compression did to it.",
        )
    top, left = max(0, (height - SEEN_PX) // 2), max(0, (width - SEEN_PX) // 2)
    seen = image[top : top + SEEN_PX, left : left + SEEN_PX]
    levels = (seen if seen.dtype == np.uint8 else seen >> 8).astype(np.int16)
    steps = np.concatenate([np.abs(np.diff(levels, axis=axis)).max(axis=2).ravel() for axis in (0, 1)])
    flat = float((steps <= FLAT_LEVELS).mean())
    soft = float((steps <= SOFT_LEVELS).mean()) - flat
    hard = float((steps > HARD_LEVELS).mean())
    # The commonest of 4096 colours, 4 bits a channel; and since it may lie at the edge of its bin, all that is near it.
    codes = (levels >> 4) @ np.array([256, 16, 1], np.int16)
    commonest = levels[codes == np.bincount(codes.ravel()).argmax()].mean(axis=0)
    background = float((np.abs(levels - commonest).max(axis=2) <= NEAR_LEVELS).mean())
    if background >= TEXT_LEAST_BACKGROUND and hard >= TEXT_LEAST_HARD:
        return Route(
            "srresnet",
            f"auto: like text: {background:.0%} is one colour and {hard:.0%} of all steps are hard; srresnet invents "
            "nothing.",
        )
    if flat >= DRAWING_LEAST_FLAT and soft <= DRAWING_MOST_SOFT and hard >= DRAWING_LEAST_HARD:
        return Route(
            "real-esrgan-anime",
            f"auto: like a drawing: {flat:.0%} is flat colour, with hard steps between; real-esrgan-anime keeps it so.",
        )
    return Route("srgan", f"auto: like a photograph: {soft:.0%} of all steps are soft; srgan looks sharpest on those.")
