from __future__ import annotations

from dataclasses import replace

import pytest

from shared.catalog import CARDS, ModelCard, card
from shared.errors import InvalidRequest

OF_ONE_SCALE = card("srgan")
OF_THREE = replace(
    card("srgan"), name="three", others=(replace(card("srgan"), scale=2), replace(card("srgan"), scale=3))
)


@pytest.mark.parametrize(
    ("model", "scale", "passes"),
    [
        (OF_ONE_SCALE, 1, [4]),
        (OF_ONE_SCALE, 3, [4]),
        (OF_ONE_SCALE, 4, [4]),
        (OF_ONE_SCALE, 5, [4, 4]),
        (OF_ONE_SCALE, 16, [4, 4]),
        (OF_THREE, 1, [2]),
        (OF_THREE, 2, [2]),
        (OF_THREE, 3, [3]),
        (OF_THREE, 4, [4]),
        (OF_THREE, 5, [2, 3]),
        (OF_THREE, 6, [2, 3]),
        (OF_THREE, 7, [2, 4]),
        (OF_THREE, 9, [3, 3]),
        (OF_THREE, 10, [3, 4]),
        (OF_THREE, 16, [4, 4]),
        (card("bicubic"), 1, [1]),
        (card("bicubic"), 13, [13]),
    ],
)
def test_a_scale_is_reached_by_the_fewest_networks_that_go_least_beyond(
    model: ModelCard, scale: int, passes: list[int]
) -> None:
    assert [each.scale for each in model.passes(scale)] == passes


@pytest.mark.parametrize("scale", [-1, 0, 17])
def test_scales_that_are_not_offered_are_refused(scale: int) -> None:
    with pytest.raises(InvalidRequest, match="The scale of srgan is 1 to 16"):
        OF_ONE_SCALE.passes(scale)


def test_names_are_used_once_and_each_scale_of_a_card_too() -> None:
    assert len({each.name for each in CARDS}) == len(CARDS)
    for each in CARDS:
        scales = [at.scale for at in each.at_each_scale]
        assert scales == sorted(set(scales))
        assert {at.name for at in each.at_each_scale} == {each.name}
