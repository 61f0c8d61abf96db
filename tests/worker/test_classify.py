from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.catalog import CLASSIFIER_WEIGHTS
from shared.errors import ModelUnavailable
from worker import classify
from worker.classify import Classifier


def picture(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def test_labels_come_most_probable_first_with_their_names() -> None:
    labels = Classifier.load().classify(picture(300, 200))
    assert len(labels) == 5
    probabilities = [label.probability for label in labels]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1
    assert all(0 <= label.index < 1000 and label.label for label in labels)
    assert len({label.index for label in labels}) == 5


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 1), (1, 50_000), (50_000, 1), (224, 224), (255, 257)])
def test_any_size_is_classified(width: int, height: int) -> None:
    assert len(Classifier.load().classify(picture(width, height))) == 5


def test_the_centre_that_the_network_sees_is_that_of_resizing_and_then_cropping() -> None:
    # 512 x 384 resizes to whole numbers, so that both ways mean the same px.
    smooth = np.asarray(Image.fromarray(picture(8, 6)).resize((512, 384), Image.Resampling.BICUBIC))
    resized = Image.fromarray(smooth[:, 64:448]).resize((256, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((16, 16, 240, 240)), np.float32)
    seen = classify._prepared(smooth)[0].permute(1, 2, 0).numpy() * classify.DEVIATION + classify.MEAN
    assert np.abs(seen - expected).max() <= 1


@pytest.mark.parametrize(
    "image", [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.uint16), np.zeros((0, 5, 3), np.uint8)]
)
def test_other_arrays_are_refused(image: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="A picture is"):
        Classifier.load().classify(image)


def test_it_is_loaded_once_in_a_process() -> None:
    assert Classifier.load() is Classifier.load()


def test_weights_with_another_hash_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "CLASSIFIER_WEIGHTS", replace(CLASSIFIER_WEIGHTS, sha256="0" * 64))
    with pytest.raises(ModelUnavailable, match="sha256 differs"):
        # The function under the cache: the process's own classifier stays as it is.
        Classifier.load.__wrapped__()


def test_the_sample_pictures_are_recognised(samples: Path) -> None:
    classifier = Classifier.load()
    paths = sorted(path for path in (samples / "classify").iterdir() if path.is_file())
    first = among_five = 0
    for path in paths:
        with Image.open(path) as opened:
            labels = classifier.classify(np.asarray(opened.convert("RGB")))
        indices = [label.index for label in labels]
        # The number before the first underscore is the class.
        true_index = int(path.name.split("_")[0])
        first += indices[0] == true_index
        among_five += true_index in indices
    assert len(paths) >= 100
    assert first / len(paths) >= 0.86, f"{first} of {len(paths)} right, {among_five} among the first five"
    assert among_five / len(paths) >= 0.96, f"{among_five} of {len(paths)} among the first five"


def test_the_threads_of_the_process_are_as_before() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Classifier.load().classify(picture(30, 20))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
