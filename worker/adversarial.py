"""Fine-tunes SRGAN (Ledig et al. 2017, https://arxiv.org/abs/1609.04802) on photographs of one's own.

The generator begins as the SRResNet or SRGAN of the catalogue, whose BatchNorm is folded away and stays so (as ESRGAN's
authors found better). The discriminator is the paper's. The content loss compares features of the finished picture with
those of the true one: of VGG19, as in the paper, where a file of its weights is given, else of EfficientNet-Lite0, the
classifier that is here anyway. A pixel loss keeps colours where they were.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.catalog import card
from worker.classify import Classifier
from worker.networks import load, trained
from worker.perception import PerceptualDistance
from worker.training import Pair, Plan, averaged, mean_psnr, set_rate, tensor_of

CONTENT_WEIGHT = 1.0
ADVERSARIAL_WEIGHT = 1e-3
"""The paper's, for the sum over a batch's mean of -log D."""
PIXEL_WEIGHT = 1e-1
"""Of the mean absolute difference: content is about ten times as large, as in ESRGAN."""
CONTENT_STAGES = 5
SLOPE = 0.2

VGG_CONTENT_WEIGHT = 1 / 12.75**2
"""The paper's scale for VGG's features, about 0.006."""
VGG_LAYERS = 36
"""Up to the activation after the fourth convolution before the fifth pooling: the paper's VGG5,4."""
VGG_MEAN, VGG_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Content = Callable[[Tensor, Tensor], Tensor]
"""How far a made picture is from the true one, (N, 3, H, W) each -> scalar."""


class Discriminator(nn.Module):
    """(N, 3, side, side) in [0, 1] -> (N,) scores, larger for what it takes for a photograph; figure 4 of the paper."""

    def __init__(self, side_px: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.LeakyReLU(SLOPE)]
        channels = 64
        for new_channels, stride in ((64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2)):
            layers += [
                nn.Conv2d(channels, new_channels, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(new_channels),
                nn.LeakyReLU(SLOPE),
            ]
            channels = new_channels
            side_px = -(-side_px // stride)
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * side_px**2, 1024), nn.LeakyReLU(SLOPE), nn.Linear(1024, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x * 2 - 1))[:, 0]


class SrganPupil:
    """Generator and discriminator, each learning from the other in turns.

    `plan.init` is srresnet (the paper's way, and what None means), srgan, or a file that this training made. Raises
    ValueError for another, or if the VGG file is none.
    """

    def __init__(self, plan: Plan, device: str, vgg: Path | None = None) -> None:
        self._plan, self._device = plan, torch.device(device)
        torch.manual_seed(plan.seed)
        self._generator = _generator(plan.init or "srresnet").to(self._device)
        self._discriminator = Discriminator(plan.patch_px * plan.scale).to(self._device)
        self._average = averaged(self._generator)
        self._adams = {
            "generator": torch.optim.Adam(self._generator.parameters(), lr=plan.learning_rate),
            "discriminator": torch.optim.Adam(self._discriminator.parameters(), lr=plan.learning_rate),
        }
        self._content = efficientnet_content(device) if vgg is None else vgg_content(vgg, device)
        self._distance = PerceptualDistance(device)

    @property
    def patch_px(self) -> int:
        return self._plan.patch_px

    def learn(self, small: NDArray[np.uint8], truth: NDArray[np.uint8], step: int, share: float) -> dict[str, float]:
        for adam in self._adams.values():
            set_rate(adam, self._plan.learning_rate, step, share)
        true = tensor_of(truth, self._device)
        made = self._generator(tensor_of(small, self._device))

        self._discriminator.requires_grad_(True)
        for_true, for_made = self._discriminator(true), self._discriminator(made.detach())
        discriminating = F.softplus(-for_true).mean() + F.softplus(for_made).mean()
        _descend(self._adams["discriminator"], discriminating)

        # -log D(G(x)), with D the logistic function of the score.
        self._discriminator.requires_grad_(False)
        adversarial = F.softplus(-self._discriminator(made)).mean()
        content, pixel = self._content(made, true), F.l1_loss(made, true)
        _descend(
            self._adams["generator"],
            CONTENT_WEIGHT * content + ADVERSARIAL_WEIGHT * adversarial + PIXEL_WEIGHT * pixel,
        )
        self._average.update_parameters(self._generator)
        return {
            "content": content.item(),
            "adversarial": adversarial.item(),
            "pixel": pixel.item(),
            "discriminator": discriminating.item(),
        }

    def judge(self, pairs: Sequence[Pair]) -> dict[str, float]:
        network = self.result()
        distances = []
        with torch.inference_mode():
            for pair in pairs:
                made = network(tensor_of(pair.small[None], self._device)).clamp(0, 1)
                distances.append(float(self._distance.between(made, tensor_of(pair.truth[None], self._device))))
        return {"psnr": mean_psnr(network, pairs), "perceptual": float(np.mean(distances))}

    def better(self, scores: dict[str, float], than: dict[str, float]) -> bool:
        """It is trained to look right: PSNR falls meanwhile, and is only shown."""
        return scores["perceptual"] < than["perceptual"]

    def result(self) -> nn.Module:
        return self._average.module

    def state(self) -> dict[str, Any]:
        return {
            "generator": self._generator.state_dict(),
            "discriminator": self._discriminator.state_dict(),
            "average": self._average.state_dict(),
            "adams": {name: adam.state_dict() for name, adam in self._adams.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._generator.load_state_dict(state["generator"])
        self._discriminator.load_state_dict(state["discriminator"])
        self._average.load_state_dict(state["average"])
        for name, adam in self._adams.items():
            adam.load_state_dict(state["adams"][name])


def efficientnet_content(device: str) -> Content:
    """Mean absolute difference of features of EfficientNet-Lite0, each stage over its own mean size; mean of stages.

    The stages down to a sixteenth of the picture's size: fine texture is in the first ones only, and what the last ones
    see is larger than a patch.
    """
    classifier = Classifier.load(device)

    def content(made: Tensor, true: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = classifier.features(true)[:CONTENT_STAGES]
        stages = zip(classifier.features(made)[:CONTENT_STAGES], wanted, strict=True)
        return torch.stack([F.l1_loss(x, y) / y.abs().mean() for x, y in stages]).mean()

    return content


def vgg_content(path: Path, device: str) -> Content:
    """The paper's: mean squared difference of VGG19's features. `path` is the state dict that torchvision publishes."""
    with torch.device("meta"):
        features = torchvision.models.vgg19().features[:VGG_LAYERS]
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        # Most of the file is what classifies, which is not needed.
        wanted = {name: found[f"features.{name}"] for name in features.state_dict()}
        features.load_state_dict(wanted, assign=True)
    except (RuntimeError, TypeError, AttributeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} holds no weights of torchvision's VGG19: {error}") from error
    features.eval().requires_grad_(False).to(device)
    mean, deviation = (torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (VGG_MEAN, VGG_DEVIATION))

    def content(made: Tensor, true: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = features((true - mean) / deviation)
        return VGG_CONTENT_WEIGHT * F.mse_loss(features((made - mean) / deviation), wanted)

    return content


def _generator(init: str) -> nn.Module:
    if init in ("srresnet", "srgan"):
        network = copy.deepcopy(load(card(init), "cpu").module)
    else:
        network = trained.read_file(Path(init), "srresnet")
    return network.requires_grad_(True)


def _descend(adam: torch.optim.Optimizer, loss: Tensor) -> None:
    adam.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()
