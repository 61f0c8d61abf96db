"""How fast is the network: what a worker runs, beside the runtimes that people use, on the same cores in one run.

    python -m tests.benchmarks.runtimes [--rounds 5] [--sizes 256x256,1024x768] [--tensorflow PYTHON] [--json FILE]

Same weights, same picture, all in turns, medians. Each call is made in a process of its own, after one to warm up: most
of these runtimes take a picture whole, and one that has done so keeps the memory. What is not installed is left out and
named. TensorFlow's pins do not go with ours: it is measured where `--tensorflow` names a Python that has it.

`over_sgemm` is the multiply-adds the network needs, as the paper draws it, over what a float32 product of 2048 x 2048
matrices does in the same round: Winograd's method can be above 1, a direct convolution cannot.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
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

SIZES = ((256, 256), (1024, 768))
WARM_UP_PX = 65_536
"""A larger picture is warmed up for with one of this size."""
SGEMM_SIDE = 2048
SGEMM = "sgemm"
OWN, COMMON, FOLDED = "enlarger", "torch as commonly run", "torch folded, channels_last"
PACKAGES = ("torch", "ncnn", "onnxruntime", "openvino")
BY_ONNX = ("onnxruntime", "openvino")
TENSORFLOW = "tensorflow"
WITH_TENSORFLOW = Path(__file__).with_name("with_tensorflow.py")

Image = np.ndarray
"""(H, W, 3) uint8."""
Call = Callable[[Image], object]


def measure(
    rounds: int = 5, sizes: tuple[tuple[int, int], ...] = SIZES, *, tensorflow: str | None = None, told: bool = False
) -> dict[str, Any]:
    """Medians over `rounds` for each size: seconds, result MP/s, and what the worker's own form is over the others.

    `tensorflow`: path of a Python that has it. `told` prints each call as it is made.
    """
    threads = prepare_process(0)
    network = load(card(DEFAULT_MODEL), "cpu")
    names = [OWN, COMMON, FOLDED]
    if find_spec("onnx") is not None:
        names += [name for name in BY_ONNX if find_spec(name) is not None]
    if tensorflow is not None:
        names.append(TENSORFLOW)
    measured: dict[str, Any] = {"machine": machine(threads), "runtime": network.runtime, "rounds": rounds, "sizes": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if set(names) & set(BY_ONNX):
            export(network.module, folder / "network.onnx")
        np.savez(folder / "network.npz", **{key: value.numpy() for key, value in network.module.state_dict().items()})
        for width, height in sizes:
            seconds: dict[str, list[float]] = {each: [] for each in (*names, SGEMM)}
            for number in range(rounds):
                for each in seconds:
                    line = [sys.executable, "-m", "tests.benchmarks.runtimes", "--one", each]
                    if each == TENSORFLOW:
                        assert tensorflow is not None
                        line = [tensorflow, str(WITH_TENSORFLOW)]
                    # As in a worker, where it is set before torch is loaded; the others are as they come.
                    more = {"OMP_WAIT_POLICY": "PASSIVE"} if each == OWN else {}
                    took = _in_a_process([*line, str(folder), str(width), str(height), str(threads)], more)
                    seconds[each].append(took)
                    if told:
                        print(f"{width}x{height}, round {number + 1}, {each}: {took:.3f} s", flush=True)
            measured["sizes"][f"{width}x{height}"] = _one_size(network, width, height, seconds)
    return {**measured, "not_measured": [name for name in (*BY_ONNX, TENSORFLOW) if name not in names]}


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


def _in_a_process(line: list[str], more: dict[str, str]) -> float:
    ran = subprocess.run(line, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(line)} ended with {ran.returncode}: {ran.stderr[-2000:]}")
    return float(ran.stdout.split()[-1])


def _one_size(network: Network, width: int, height: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    needed = 2 * network.multiply_adds_per_px * width * height
    sgemm = 2 * SGEMM_SIDE**3 / median(seconds[SGEMM])
    medians = {name: median(times) for name, times in seconds.items() if name != SGEMM}
    others = {name: value for name, value in medians.items() if name != OWN}
    fastest = min(others, key=lambda name: others[name])
    return {
        "sgemm_gflops": round(sgemm / 1e9, 1),
        "fastest_other": fastest,
        "over_fastest_other": round(others[fastest] / medians[OWN], 3),
        "over_sgemm": round(needed / medians[OWN] / sgemm, 3),
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


# --- in a process of its own ----------------------------------------------------------------------------------------


def one(name: str, folder: Path, width: int, height: int, threads: int) -> float:
    """Seconds of one call."""
    prepare_process(threads)
    if name == SGEMM:
        a, b = torch.randn(2, SGEMM_SIDE, SGEMM_SIDE)
        call: Call = lambda _: a @ b  # noqa: E731
    elif name == "onnxruntime":
        call = by_onnxruntime(folder / "network.onnx", threads)
    elif name == "openvino":
        call = by_openvino(folder / "network.onnx", threads)
    else:
        call = by_torch(name)
    image = picture(width, height)
    side = min(1.0, (WARM_UP_PX / (width * height)) ** 0.5)
    warm_up = picture(round(width * side), round(height * side))
    with torch.inference_mode():
        # The second finds what the first has made.
        call(warm_up)
        call(warm_up)
        started = time.perf_counter()
        call(image)
        return time.perf_counter() - started


def picture(width: int, height: int) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def floats(image: Image) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None].contiguous()


def by_torch(name: str) -> Call:
    network = load(card(DEFAULT_MODEL), "cpu")
    if name == COMMON:
        common = as_commonly_run(network.module)
        return lambda image: common(floats(image))
    if name == FOLDED:
        return lambda image: network.module(floats(image).contiguous(memory_format=torch.channels_last))
    network.warm_up()
    return lambda image: list(enlarge(network, image, network.scale, dtype=np.uint8))


def by_onnxruntime(file: Path, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"x": floats(image).numpy()})


def by_openvino(file: Path, threads: int) -> Call:
    import openvino

    # Its default may be bfloat16, which is another picture.
    precise = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", precise)
    return lambda image: compiled(floats(image).numpy())


def export(module: nn.Module, file: Path) -> None:
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


def as_commonly_run(module: nn.Module) -> nn.Module:
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
    parser.add_argument("--tensorflow", metavar="PYTHON", help="a Python that has TensorFlow, to measure it too")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        name, folder, width, height, threads = asked.one
        print(one(name, Path(folder), int(width), int(height), int(threads)))
        return
    sizes = tuple((int(width), int(height)) for width, height in (size.split("x") for size in asked.sizes.split(",")))
    measured = measure(asked.rounds, sizes, tensorflow=asked.tensorflow, told=True)
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
        print(f"not at hand, and so not measured: {', '.join(measured['not_measured'])}")


if __name__ == "__main__":
    main()
