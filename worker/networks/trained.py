"""Weights that `enlarger train` made: safetensors that say in their metadata what they are and where they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
from torch import nn

from shared.errors import ModelUnavailable
from worker.networks.architecture import Architecture
from worker.networks.fsrcnn import Fsrcnn
from worker.networks.luma import LumaNetwork
from worker.networks.srcnn import Srcnn
from worker.networks.srresnet import SrResNet

FORMAT = "enlarger-1"
"""Under `format` in the metadata: what tells these files from those of other programs."""

LUMA_NETWORKS: dict[str, Callable[[int], LumaNetwork]] = {"srcnn": Srcnn, "fsrcnn": Fsrcnn}


def facts_of(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file; empty if it has none. Raises ModelUnavailable if it is no such file."""
    try:
        length = int.from_bytes(content[:8], "little")
        return cast(dict[str, str], json.loads(content[8 : 8 + length]).get("__metadata__", {}))
    except (ValueError, AttributeError) as error:
        raise ModelUnavailable("This is no safetensors file.") from error


def is_ours(content: bytes) -> bool:
    """Whether these bytes are a file that `write` made."""
    try:
        return facts_of(content).get("format") == FORMAT
    except ModelUnavailable:
        return False


def empty(architecture: str, scale: int) -> Architecture:
    """The network of that kind without its weights. Raises ModelUnavailable for one that is not ours."""
    if architecture in LUMA_NETWORKS and 2 <= scale <= 4:
        return LUMA_NETWORKS[architecture](scale)
    if architecture == "srresnet" and scale == 4:
        return SrResNet()
    raise ModelUnavailable(
        f"There is no network {architecture!r} for x{scale} that `enlarger train` makes.",
        architecture=architecture,
        scale=scale,
    )


def read(content: bytes, scale: int) -> Architecture:
    """A frozen network from the bytes of a file that `write` made. Raises ModelUnavailable for any other."""
    if not is_ours(content):
        raise ModelUnavailable("These weights were not made by `enlarger train`.")
    facts = facts_of(content)
    if facts["scale"] != str(scale):
        raise ModelUnavailable(f"These weights are for x{facts['scale']}, not for x{scale}.", scale=scale)
    network = empty(facts["architecture"], scale)
    try:
        network.load_state_dict(safetensors.torch.load(content))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ModelUnavailable(
            f"The weights are not those of the {facts['architecture']} that they say they are: {error}",
            architecture=facts["architecture"],
        ) from error
    return network.freeze() if isinstance(network, SrResNet) else network


def read_file(path: Path, architecture: str) -> Any:
    """The network in a file that `write` made, to train on from. Raises ValueError if it is of another kind."""
    try:
        content = path.read_bytes()
        facts = facts_of(content)
        if facts.get("architecture") != architecture:
            raise ValueError(
                f"{path} holds {facts.get('architecture', 'weights of another program')}, not {architecture}."
            )
        return read(content, int(facts["scale"]))
    except (OSError, ModelUnavailable) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def write(path: Path, network: nn.Module, architecture: str, scale: int, facts: dict[str, Any]) -> None:
    """The network's weights in float32, with `facts` (JSON values) beside what `read` needs."""
    metadata = {"format": FORMAT, "architecture": architecture, "scale": str(scale)}
    metadata |= {name: each if isinstance(each, str) else json.dumps(each) for name, each in facts.items()}
    weights = {name: each.detach().float().cpu().contiguous() for name, each in network.state_dict().items()}
    # Not save_file: it makes files that nobody else may read, and the workers may be another user.
    path.write_bytes(safetensors.torch.save(weights, metadata))
