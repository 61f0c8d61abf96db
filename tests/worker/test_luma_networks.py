"""SRCNN and FSRCNN as drawn, whatever their weights; what the shipped weights score is in test_metrics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.bicubic import imresize
from worker.networks.fsrcnn import Fsrcnn
from worker.networks.luma import LUMA, LumaNetwork
from worker.networks.srcnn import Srcnn

EACH = [(architecture, scale) for architecture in (Srcnn, Fsrcnn) for scale in (2, 3, 4)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_network(architecture: type[Srcnn | Fsrcnn], scale: int) -> LumaNetwork:
    """Weights that let all layers count."""
    network = architecture(scale)
    network.begin(seeded())
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=seeded(1))
    return network.eval().requires_grad_(False)


def random_picture(height: int, width: int, channels: int = 3) -> Tensor:
    return torch.rand((1, channels, height, width), generator=seeded(2))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_colours_are_matlabs(scale: int) -> None:
    picture = random_picture(7, 9)
    large = Srcnn(scale).bicubic(picture)[0]
    for plane, expected in zip(large, picture[0].double().numpy(), strict=True):
        assert plane.numpy() == pytest.approx(imresize(expected, 9 * scale, 7 * scale), abs=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_last_layer_of_fsrcnn_is_the_deconvolution_of_the_paper(scale: int) -> None:
    network = random_network(Fsrcnn, scale)
    assert isinstance(network, Fsrcnn)
    features = torch.randn((1, 56, 6, 5), generator=seeded())
    expected = F.conv_transpose2d(
        features, network.deconvolution[:, None], stride=scale, padding=4, output_padding=scale - 1
    )
    reach = network.taps.shape[1] // 2
    computed = F.pixel_shuffle(F.conv2d(features, network.out_weight(), padding=reach), scale)
    assert (computed - expected).abs().max() < 1e-4


def test_the_networks_have_the_sizes_of_the_papers() -> None:
    # Weights without biases and slopes: 57,184 for 9-5-5 and 12,464 for (56, 12, 4).
    for architecture, weights in ((Srcnn, 57_184), (Fsrcnn, 12_464)):
        parameters = dict(architecture(3).named_parameters())
        counted = [each.numel() for name, each in parameters.items() if "bias" not in name and "slope" not in name]
        assert sum(counted) == weights


@pytest.mark.parametrize(("architecture", "scale"), EACH)
def test_an_output_pixel_depends_on_all_within_reach_and_nothing_beyond(
    architecture: type[Srcnn | Fsrcnn], scale: int
) -> None:
    network = random_network(architecture, scale)
    side = 2 * network.reach_px + 5
    picture = random_picture(side, side).requires_grad_(True)
    middle = side // 2 * scale
    network(picture)[:, :, middle : middle + scale, middle : middle + scale].sum().backward()
    assert picture.grad is not None
    touched = picture.grad.abs().sum(dim=(0, 1)).nonzero()
    reach = int((touched - side // 2).abs().max())
    # 8 px of the enlarged grid are no whole px at x3: there one px more is read than is seen.
    assert reach == network.reach_px - (architecture is Srcnn and scale == 3)


@pytest.mark.parametrize(("architecture", "scale"), EACH)
def test_what_is_not_padded_is_the_middle_of_what_is(architecture: type[Srcnn | Fsrcnn], scale: int) -> None:
    network = random_network(architecture, scale)
    gray = random_picture(20, 23, channels=1).expand(1, 3, 20, 23)
    border = network.reach_px * scale
    middle = network(gray)[:, :1, border:-border, border:-border]
    assert (network.valid(gray[:, :1]) - middle).abs().max() < 1e-5


@pytest.mark.parametrize(("architecture", "scale"), EACH)
def test_luma_is_the_networks_and_chroma_is_bicubic(architecture: type[Srcnn | Fsrcnn], scale: int) -> None:
    network = random_network(architecture, scale)
    picture = random_picture(12, 10)
    weights = torch.tensor(LUMA).view(1, 3, 1, 1)
    large, soft = network(picture), network.bicubic(picture)
    of_luma_alone = network(F.conv2d(picture, weights).expand(1, 3, 12, 10))[:, :1]
    assert (F.conv2d(large, weights) - of_luma_alone).abs().max() < 1e-5
    # Cb and Cr are B - Y and R - Y, each with a factor.
    for colour in (0, 2):
        apart = large[:, colour] - F.conv2d(large, weights)[:, 0]
        assert (apart - (soft[:, colour] - F.conv2d(soft, weights)[:, 0])).abs().max() < 1e-5


def test_gray_stays_gray() -> None:
    large = random_network(Fsrcnn, 2)(random_picture(9, 9, channels=1).expand(1, 3, 9, 9))
    assert (large[:, 0] - large[:, 2]).abs().max() < 1e-5


def test_srcnn_begins_near_the_bicubic_picture() -> None:
    network = Srcnn(4)
    network.begin(seeded())
    picture = random_picture(16, 16)
    with torch.inference_mode():
        assert (network(picture) - network.bicubic(picture)).abs().mean() < 0.02


def test_for_another_scale_fsrcnn_takes_over_all_but_its_deconvolution() -> None:
    trained, network = random_network(Fsrcnn, 4), Fsrcnn(2)
    network.begin(seeded(3))
    begun = network.deconvolution.detach().clone()
    assert network.take_over(trained) == ["deconvolution", "out_bias"]
    assert torch.equal(network.deconvolution, begun)
    assert torch.equal(network.features.weight, trained.get_parameter("features.weight"))
    same = Fsrcnn(4)
    assert same.take_over(trained) == []
    assert torch.equal(same.deconvolution, trained.get_parameter("deconvolution"))


def test_srcnn_takes_over_all_for_any_scale() -> None:
    trained, network = random_network(Srcnn, 4), Srcnn(3)
    assert network.take_over(trained) == []
    assert torch.equal(network.mapping.weight, trained.get_parameter("mapping.weight"))


def test_half_precision_differs_by_fractions_of_a_level() -> None:
    network = Fsrcnn(2)
    network.begin(seeded())
    picture = random_picture(12, 12)
    with torch.inference_mode():
        full, half = network.enlarge(picture), network.half().enlarge(picture.half())
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() * 255 < 2
