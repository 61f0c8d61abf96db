"""How fast is the network: what a worker runs, beside the runtimes that people use, on the same cores in one run.

    python -m tests.benchmarks.runtimes [--rounds 5] [--sizes 256x256,512x384] [--json FILE]

Same weights, same picture, all interleaved, medians. What is not installed is left out and named. `over_sgemm` is the
multiply-adds the network needs, as the paper draws it, over what a float32 product of 2048 x 2048 matrices does in the
same round: Winograd's method can be above 1, a direct convolution cannot.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.calibration import processor
from shared.catalog import DEFAULT_MODEL, card
from worker.networks import Network, load
from worker.networks.srresnet import SrResNet
from worker.upscale import enlarge, plan_work, prepare_process

# All the forms beside ours take a picture whole: with all of them in one process, 1024 x 768 px ended at 24 GB.
SIZES = ((256, 256), (512, 384))
SGEMM_SIDE = 2048
SLOWEST_SIZE_PX = 500_000
"""Beyond it the slowest form runs in the first round only: it is some ten times slower than the others."""
PACKAGES = ("torch", "ncnn", "onnxruntime", "openvino", "tensorflow")

Form = Callable[[], object]


def measure(rounds: int = 5, sizes: tuple[tuple[int, int], ...] = SIZES) -> dict[str, Any]:
    """Medians over `rounds` for each size: seconds, result MP/s, and what the worker's own form is over the others."""
    threads = prepare_process(0)
    network = load(card(DEFAULT_MODEL), "cpu")
    measured: dict[str, Any] = {"machine": machine(threads), "runtime": network.runtime, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        makers = _makers(network, Path(folder), threads)
        for width, height in sizes:
            image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
            forms = {name: make(image) for name, make in makers.items()}
            measured["sizes"][f"{width}x{height}"] = _one_size(network, width, height, forms, rounds)
    missing = [name for name in ("onnxruntime", "openvino", "tensorflow") if name not in makers]
    return {**measured, "not_measured": missing}


def machine(threads: int) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        **versions,
    }


def _one_size(network: Network, width: int, height: int, forms: dict[str, Form], rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    a, b = torch.randn(2, SGEMM_SIDE, SGEMM_SIDE)
    forms = {**forms, "sgemm": lambda: a @ b}
    seconds["sgemm"] = []
    for number in range(rounds + 1):
        for name, form in forms.items():
            if name == "torch as commonly run" and width * height > SLOWEST_SIZE_PX and number != 1:
                continue
            started = time.perf_counter()
            with torch.inference_mode():
                form()
            # The first round warms up.
            if number > 0:
                seconds[name].append(time.perf_counter() - started)
    needed = 2 * network.multiply_adds_per_px * width * height
    sgemm = 2 * SGEMM_SIDE**3 / median(seconds.pop("sgemm"))
    medians = {name: median(times) for name, times in seconds.items()}
    others = {name: value for name, value in medians.items() if name != "enlarger"}
    fastest = min(others, key=lambda name: others[name])
    return {
        "sgemm_gflops": round(sgemm / 1e9, 1),
        "fastest_other": fastest,
        "over_fastest_other": round(others[fastest] / medians["enlarger"], 3),
        "over_sgemm": round(needed / medians["enlarger"] / sgemm, 3),
        "waste": round(plan_work(network, width, height, network.scale).waste, 3),
        "forms": {
            name: {
                "seconds": round(value, 4),
                "result_megapixels_per_second": round(width * height * network.scale**2 / 1e6 / value, 3),
                "gflops": round(needed / value / 1e9, 1),
                "all_seconds": [round(each, 4) for each in seconds[name]],
            }
            for name, value in medians.items()
        },
    }


def _makers(network: Network, folder: Path, threads: int) -> dict[str, Callable[[np.ndarray], Form]]:
    """For each runtime that is installed, what makes of a picture a call that enlarges it."""
    module = network.module
    common = _as_commonly_run(module)

    def floats(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None].contiguous()

    def folded(image: np.ndarray) -> Form:
        x = floats(image).contiguous(memory_format=torch.channels_last)
        return lambda: module(x)

    def plain(image: np.ndarray) -> Form:
        x = floats(image)
        return lambda: common(x)

    makers: dict[str, Callable[[np.ndarray], Form]] = {
        "enlarger": lambda image: lambda: list(enlarge(network, image, network.scale, dtype=np.uint8)),
        "torch as commonly run": plain,
        "torch folded, channels_last": folded,
    }
    if find_spec("onnx") is None:
        return makers
    file = folder / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.rand(1, 3, 32, 32),),
            str(file),
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {2: "height", 3: "width"}},
        )
    if find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

        def by_onnxruntime(image: np.ndarray) -> Form:
            x = floats(image).numpy()
            return lambda: session.run(None, {"x": x})

        makers["onnxruntime"] = by_onnxruntime
    if find_spec("openvino") is not None:
        import openvino

        # Its default may be bfloat16, which is another picture.
        precise = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(file), "CPU", precise)

        def by_openvino(image: np.ndarray) -> Form:
            x = floats(image).numpy()
            return lambda: compiled(x)

        makers["openvino"] = by_openvino
    return makers


def _as_commonly_run(module: nn.Module) -> nn.Module:
    """Channels first, and each BatchNorm a layer of its own; here with nothing left for it to do."""
    made = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    assert isinstance(made, SrResNet)

    def normalized(conv: nn.Module) -> nn.Module:
        return nn.Sequential(conv, nn.BatchNorm2d(made.channels)).eval()

    for block in made.blocks:
        block.first, block.second = normalized(block.first), normalized(block.second)  # type: ignore[union-attr]
    made.merge = normalized(made.merge)  # type: ignore[assignment]
    return made.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the network beside other runtimes.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default=",".join(f"{width}x{height}" for width, height in SIZES))
    parser.add_argument("--json", type=Path, help="write all figures there")
    asked = parser.parse_args()
    sizes = tuple((int(width), int(height)) for width, height in (size.split("x") for size in asked.sizes.split(",")))
    measured = measure(asked.rounds, sizes)
    if asked.json:
        asked.json.write_text(json.dumps(measured, indent=2) + "\n")
    report(measured)


def report(measured: dict[str, Any]) -> None:
    facts = measured["machine"]
    print(f"srgan on {facts['cpu']}, {facts['threads']} threads; a worker runs it by {measured['runtime']}")
    for size, found in measured["sizes"].items():
        print(
            f"{size}: {found['over_fastest_other']:.2f} x {found['fastest_other']}, {found['over_sgemm']:.2f} x sgemm "
            f"({found['sgemm_gflops']:g} GFLOP/s), work done over needed {found['waste']:.2f}"
        )
        for name, form in found["forms"].items():
            speed = form["result_megapixels_per_second"]
            print(f"  {name:<28} {form['seconds']:8.3f} s  {speed:7.3f} MP/s of result  {form['gflops']:6.1f} GFLOP/s")
    if measured["not_measured"]:
        print(f"not installed, and so not measured: {', '.join(measured['not_measured'])}")


if __name__ == "__main__":
    main()
