"""Models of your own: files that somebody puts into ENLARGER_MODELS_DIR, made by `enlarger train` or in any
architecture that spandrel knows.

A file is data here, never a program: `.safetensors`, or `.pth` and `.pt` by torch's reader that makes nothing but
tensors and plain values. A file that cannot be read or run is a Fault with a reason, and harms none beside it.

`python -m worker.networks.own FOLDER` prints what is found in a folder, as JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shared.catalog import CARDS, EXACT, LARGEST_SCALE, ModelCard, OwnFile
from shared.errors import ModelUnavailable
from worker.networks import trained
from worker.networks.architecture import Architecture

SUFFIXES = (".safetensors", ".pth", ".pt")
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
HALO_PX = 32
PROBE_PX = 64
ACTIVATIONS_HELD = 3
"""How many times the largest layer's input and output are thought held at once; what does not fit is cut smaller."""


@dataclass(frozen=True)
class Fault:
    """A file that is no model here, and why."""

    path: str
    reason: str


class Own(Architecture):
    """Any RGB network of spandrel's. What it costs is measured on a small picture, once."""

    def __init__(self, content: bytes) -> None:
        import spandrel

        described = spandrel.ModelLoader("cpu").load_from_state_dict(
            spandrel.canonicalize_state_dict(_state_dict(content))
        )
        if not isinstance(described, spandrel.ImageModelDescriptor):
            raise ModelUnavailable(f"A {described.architecture.name} network needs more than a picture.")
        if (described.input_channels, described.output_channels) != (3, 3):
            raise ModelUnavailable(
                f"The network takes {described.input_channels} channels and makes {described.output_channels}; "
                "pictures here have 3."
            )
        if not 1 <= described.scale <= LARGEST_SCALE:
            raise ModelUnavailable(f"The network enlarges {described.scale} times; 1 to {LARGEST_SCALE} are offered.")
        described.eval()
        flops, held_bytes = _costs(described)
        super().__init__(
            scale=described.scale,
            # Not known. What is read around a tile is a custom and no promise; the card says so.
            reach_px=HALO_PX,
            body_multiply_adds=max(1, flops // 2 // PROBE_PX**2),
            bytes_per_px=ACTIVATIONS_HELD * held_bytes // PROBE_PX**2 + 3 * 4 * described.scale**2,
        )
        self.architecture_name = described.architecture.name
        self.tags = tuple(described.tags)
        self.supports_half = described.supports_half
        self.network = described.model
        # Sees to what sizes the network can take; holds the same module.
        self._described = described
        for layer in self.network.modules():
            layer.register_forward_hook(lambda *_: self.on_step())

    def forward(self, x: Tensor) -> Tensor:
        # One by one: more than one tile in a call is nothing that spandrel promises of its networks.
        return torch.cat([self._described(x[index : index + 1]) for index in range(x.shape[0])])


def read(content: bytes, scale: int) -> Architecture:
    """The network of a file's bytes; of any scale where `scale` is 0. Raises ModelUnavailable for what is none, in
    words for who put it there."""
    if trained.is_ours(content):
        return trained.read(content, scale or int(trained.facts_of(content)["scale"]))
    try:
        network = Own(content)
    except ModelUnavailable:
        raise
    # Whatever a stranger's file makes torch or spandrel raise, it is the file's fault and not the worker's.
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelUnavailable(f"Not a network that spandrel knows: {first_line[:300]}") from error
    assert network.scale == scale or scale == 0
    return network


def scan(folder: Path) -> tuple[list[ModelCard], list[Fault]]:
    """A card for each file of the folder that can be run, and a Fault for each that cannot. Loads every one."""
    if not folder.is_dir():
        return [], [Fault(str(folder), "ENLARGER_MODELS_DIR names no folder here: make it, or correct the setting.")]
    cards: dict[str, ModelCard] = {}
    faults: list[Fault] = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES:
            continue
        try:
            found = _card(path)
            if found.name in cards:
                raise ModelUnavailable(f"There is another file named {found.name}; rename one.")
            cards[found.name] = found
        except (ModelUnavailable, OSError) as error:
            faults.append(Fault(str(path), getattr(error, "detail", str(error))))
    return list(cards.values()), faults


def _card(path: Path) -> ModelCard:
    name = path.stem
    if not NAME.fullmatch(name) or name == "auto":
        raise ModelUnavailable("Rename the file: a model's name has letters, digits, dots, dashes and underscores.")
    if any(name == card.name for card in CARDS):
        raise ModelUnavailable(f"Rename the file: {name} is the name of a model of the catalogue.")
    content = path.read_bytes()
    network = read(content, 0)
    if isinstance(network, Own):
        architecture = network.architecture_name
        described = ", ".join((architecture, *network.tags))
        guarantee = (
            f"None: how far the network sees is not known. Tiles read {HALO_PX} px around themselves; the job's "
            "report says how well the seams came out."
        )
    else:
        architecture = trained.facts_of(content)["architecture"]
        described, guarantee = f"{architecture}, trained here", EXACT
    return ModelCard(
        name=name,
        architecture=architecture,
        scale=network.scale,
        halo_px=network.reach_px,
        summary=f"Your own: {path.name} ({described}).",
        guarantee=guarantee,
        licence="as its author says",
        source_url="",
        origin=f"The file {path.name} in ENLARGER_MODELS_DIR.",
        weights=OwnFile(path=str(path.absolute()), sha256=hashlib.sha256(content).hexdigest()),
        megaflops_per_input_px=2 * network.body_multiply_adds / 1e6,
        # A network that enlarges nothing, such as one that takes noise away, cannot be run until the size is reached.
        largest_scale=1 if network.scale == 1 else LARGEST_SCALE,
    )


def _state_dict(content: bytes) -> dict[str, Any]:
    # A zip archive, or a bare pickle: torch's. Safetensors begins with the length of its header.
    if content[:2] == b"PK" or content[:1] == b"\x80":
        try:
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            raise ModelUnavailable(
                "The file holds more than weights, or is damaged: torch refuses it as data alone (weights_only). "
                "Convert it to .safetensors where you trust it."
            ) from error
        if not isinstance(loaded, dict):
            raise ModelUnavailable("The file holds no dictionary of weights.")
        return loaded
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ModelUnavailable(f"Neither safetensors nor a file of torch's: {error}") from error


def _costs(described: Any) -> tuple[int, int]:
    """Operations of one call on a PROBE_PX square, and the bytes of the largest layer's input and output."""
    largest = 0

    def look(_layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        nonlocal largest
        tensors = [each for each in (*given, made) if isinstance(each, Tensor)]
        largest = max(largest, sum(4 * each.numel() for each in tensors))

    leaves = [layer for layer in described.model.modules() if not any(layer.children())]
    hooks = [layer.register_forward_hook(look) for layer in leaves]
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        described(torch.full((1, 3, PROBE_PX, PROBE_PX), 0.5))
    for hook in hooks:
        hook.remove()
    return counted.get_total_flops(), largest


def main() -> None:
    cards, faults = scan(Path(sys.argv[1]))
    found = {
        "models": [dataclasses.asdict(card) for card in cards],
        "faults": [dataclasses.asdict(fault) for fault in faults],
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
