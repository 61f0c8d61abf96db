"""How fast the network is on a GPU, how far from float32, and what a whole picture costs there, codec included.

    python -m tests.benchmarks.gpu [--device cuda:0] [--side 256] [--batch 8] [--rounds 7] [--pictures 32]
                                   [--attempts 4] [--compile] [--json FILE]

`srgan`, one call of `--batch` tiles of `--side` px, all forms in turns, medians: as a worker runs it; as most code runs
it, channels first and BatchNorm kept, in float32 and in float16; the worker's own form replayed as a CUDA graph, and
with `--compile` through torch.compile. `over_product` is the multiply-adds that the network needs over what a bfloat16
product of large matrices does in the same round: what the device could do at most, were it as good at convolutions.
`end_to_end` enlarges JPEGs into PNGs, by one attempt at a time and by `--attempts` beside each other.

On a CPU (`--device cpu`) the same runs, to show that it does; its figures say nothing about a GPU, and say so.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.catalog import DEFAULT_MODEL, card
from tests.benchmarks.runtimes import as_commonly_run, machine
from worker.bench import _scene
from worker.enlarging import Engine, Wanted
from worker.networks import Network, load
from worker.upscale import prepare_process

OWN = "enlarger"
FLOAT32, FLOAT16 = "float32, channels first, eager", "float16, channels first, eager"
GRAPH, COMPILED = "enlarger, CUDA graph", "enlarger, torch.compile"
PRODUCT = "product"
PRODUCT_SIDE = 8192
WARM_UP_CALLS = 3
SHARE_WITHIN = 0.9999
"""Of all px this share is at most `levels_within` from float32."""
OF_A_CPU = "of a CPU: that this runs, and nothing about a GPU"

Call = Callable[[], object]


def measure(
    device: str,
    *,
    side: int = 256,
    batch: int = 8,
    rounds: int = 7,
    pictures: int = 32,
    attempts: int = 4,
    compiled: bool = False,
    product_side: int = PRODUCT_SIDE,
) -> dict[str, Any]:
    """The figures, JSON values. `levels`: how far half precision is from float32 on a made picture."""
    threads = prepare_process(0)
    network = load(card(DEFAULT_MODEL), device)
    scene = torch.from_numpy(_scene(side * 4) / np.float32(255)).permute(2, 0, 1)
    # Different tiles of one picture.
    corners = [(index % 4 * side, index // 4 % 4 * side) for index in range(batch)]
    tiles = torch.stack([scene[:, y : y + side, x : x + side] for x, y in corners]).to(device)
    forms, not_measured = _forms(network, tiles, compiled=compiled)
    a, b = torch.randn((2, product_side, product_side), device=device).to(torch.bfloat16)
    seconds = _in_turns({**forms, PRODUCT: lambda: a @ b}, device, rounds)
    product = 2 * product_side**3 / seconds.pop(PRODUCT)
    needed = 2 * network.multiply_adds_per_px * batch * side * side
    on_gpu = network.device.type == "cuda"
    return {
        "figures": "of a GPU" if on_gpu else OF_A_CPU,
        "machine": {**machine(threads), "device": torch.cuda.get_device_name(device) if on_gpu else "cpu"},
        "side_px": side,
        "batch": batch,
        "rounds": rounds,
        "product_teraflops": round(product / 1e12, 3),
        "forms": {
            name: {
                "seconds": round(value, 6),
                "result_megapixels_per_second": round(batch * (side * network.scale) ** 2 / 1e6 / value, 3),
                "over_float32": round(seconds[FLOAT32] / value, 3),
                "over_product": round(needed / value / product, 4),
            }
            for name, value in seconds.items()
        },
        "not_measured": not_measured,
        "levels": _levels(network, tiles),
        "memory": _memory(network, tiles),
        "end_to_end": _end_to_end(device, side, pictures, attempts),
    }


def _forms(network: Network, tiles: Tensor, *, compiled: bool) -> tuple[dict[str, Call], list[str]]:
    common = as_commonly_run(network.module)
    common_half = copy.deepcopy(common).half()
    half_tiles = tiles.half()
    forms: dict[str, Call] = {
        OWN: lambda: network(tiles, half=True),
        FLOAT32: _inferring(lambda: common(tiles)),
        FLOAT16: _inferring(lambda: common_half(half_tiles)),
    }
    not_measured = []
    module = network.module.halved()
    last = tiles.to(module.half_takes).contiguous(memory_format=torch.channels_last)
    if network.device.type == "cuda":
        forms[GRAPH] = _replayed(module, last)
    else:
        not_measured.append(GRAPH)
    if compiled:
        enlarge = torch.compile(module.enlarge)
        forms[COMPILED] = _inferring(lambda: enlarge(last))
    else:
        not_measured.append(COMPILED)
    return forms, not_measured


def _inferring(call: Call) -> Call:
    def inferring() -> object:
        with torch.inference_mode():
            return call()

    return inferring


def _replayed(module: Any, tiles: Tensor) -> Call:
    graph, beside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.inference_mode():
        # What a library sets up at first is no part of the graph.
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP_CALLS):
                module.enlarge(tiles)
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(graph):
            module.enlarge(tiles)
    return graph.replay


def _in_turns(calls: dict[str, Call], device: str, rounds: int) -> dict[str, float]:
    """The median seconds of each."""
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _finished(device)
            started = time.perf_counter()
            call()
            _finished(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: median(each) for name, each in seconds.items()}


def _finished(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _levels(network: Network, tiles: Tensor) -> dict[str, float]:
    apart = ((network(tiles, half=True) - network(tiles)).abs() * 255).amax(1).flatten()
    within = apart.sort().values[min(apart.numel() - 1, int(SHARE_WITHIN * apart.numel()))]
    return {
        "mean": round(float(apart.mean()), 4),
        "within": round(float(within), 3),
        "max": round(float(apart.max()), 3),
    }


def _memory(network: Network, tiles: Tensor) -> dict[str, int | None]:
    """What a call is thought to take, in float32, and what it took with half precision at most."""
    count, _, height, width = tiles.shape
    estimated = count * (network.fixed_bytes + height * width * network.bytes_per_px)
    if network.device.type != "cuda":
        return {"estimated_bytes": estimated, "taken_bytes": None}
    torch.cuda.reset_peak_memory_stats(network.device)
    before = torch.cuda.memory_allocated(network.device)
    network(tiles, half=True)
    return {"estimated_bytes": estimated, "taken_bytes": torch.cuda.max_memory_allocated(network.device) - before}


def _end_to_end(device: str, side: int, pictures: int, attempts: int) -> dict[str, Any]:
    """JPEG in, PNG out; MP of result a second, and how many tiles a call had."""
    file = io.BytesIO()
    Image.fromarray(_scene(side)).save(file, "JPEG", quality=90)
    measured: dict[str, Any] = {"pictures": pictures}
    for beside in (1, attempts):
        # On a CPU a plan would choose strips: cut into tiles it goes a GPU's way.
        tile_px = side if device == "cpu" else 0
        engine = Engine(device, max_input_px=10**8, max_output_px=10**9, tile_px=tile_px, batched=True)
        assert engine.batcher is not None
        engine.warm_up()
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(beside) as pool:

            def one(number: int, engine: Engine = engine, folder: str = folder) -> int:
                made = engine.enlarge_file(io.BytesIO(file.getvalue()), Path(folder) / f"{number}.png", Wanted())
                return made.width * made.height

            one(-1)
            calls = engine.batcher.calls
            started = time.perf_counter()
            made_px = sum(pool.map(one, range(pictures)))
            seconds = time.perf_counter() - started
        measured[f"{beside} at once"] = {
            "result_megapixels_per_second": round(made_px / 1e6 / seconds, 3),
            "calls": engine.batcher.calls - calls,
        }
        engine.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the network on a GPU, and whole pictures.")
    parser.add_argument("--device", default="cuda:0", help="torch's word; cpu shows that it runs")
    parser.add_argument("--side", type=int, default=256, help="of a tile, in px")
    parser.add_argument("--batch", type=int, default=8, help="tiles in a call")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=32, help="enlarged end to end")
    parser.add_argument("--attempts", type=int, default=4, help="of them at once")
    parser.add_argument("--product-side", type=int, default=PRODUCT_SIDE, help="of the matrices that are multiplied")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: needs a C++ compiler, takes minutes")
    parser.add_argument("--json", type=Path, help="write all figures there")
    asked = parser.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; with --device cpu the same runs on the CPU")
    measured = measure(
        asked.device,
        side=asked.side,
        batch=asked.batch,
        rounds=asked.rounds,
        pictures=asked.pictures,
        attempts=asked.attempts,
        compiled=asked.compile,
        product_side=asked.product_side,
    )
    if asked.json:
        asked.json.write_text(json.dumps(measured, indent=2) + "\n")
    report(measured)


def report(measured: dict[str, Any]) -> None:
    print(f"srgan on {measured['machine']['device']}: figures {measured['figures']}")
    print(
        f"{measured['batch']} tiles of {measured['side_px']} px in a call; "
        f"a bfloat16 product does {measured['product_teraflops']:g} TFLOP/s"
    )
    for name, form in measured["forms"].items():
        speed, over = form["result_megapixels_per_second"], form["over_float32"]
        print(f"  {name:<32} {speed:10.2f} MP/s of result  {over:6.2f} x float32  {form['over_product']:.3f} x product")
    levels = measured["levels"]
    print(
        f"half precision: {SHARE_WITHIN:.2%} of px within {levels['within']:g} levels of float32, max {levels['max']:g}"
    )
    for name, found in measured["end_to_end"].items():
        if name != "pictures":
            speed, calls, pictures = (
                found["result_megapixels_per_second"],
                found["calls"],
                measured["end_to_end"]["pictures"],
            )
            print(f"end to end, {name}: {speed:.2f} MP/s of result, {pictures} pictures in {calls} calls")
    if measured["not_measured"]:
        print(f"not measured: {', '.join(measured['not_measured'])}")


if __name__ == "__main__":
    main()
