"""SRGAN's generator by TensorFlow: seconds of one call. `tests.benchmarks.runtimes` runs this file with a Python that
has TensorFlow and need have nothing else of ours:

    PYTHON with_tensorflow.py FOLDER WIDTH HEIGHT THREADS

FOLDER/network.npz holds the weights by their names in `worker.networks.srresnet`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
WARM_UP_PX = 65_536


def main() -> None:
    import numpy as np
    import tensorflow as tf

    folder, (width, height, threads) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    weights = dict(np.load(folder / "network.npz"))
    blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})

    def conv(x: Any, name: str) -> Any:
        # (C_out, C_in, k, k) as TensorFlow has it: (k, k, C_in, C_out).
        kernel = tf.constant(weights[f"{name}.weight"].transpose(2, 3, 1, 0))
        return tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), weights[f"{name}.bias"])

    def prelu(x: Any, name: str) -> Any:
        return tf.maximum(x, 0) + weights[f"{name}.weight"] * tf.minimum(x, 0)

    def shuffled(x: Any) -> Any:
        # torch's order of channels is (C, 2, 2), TensorFlow's (2, 2, C).
        rows, columns, channels = tf.shape(x)[1], tf.shape(x)[2], x.shape[3] // 4
        x = tf.reshape(x, (1, rows, columns, channels, 2, 2))
        x = tf.transpose(x, (0, 1, 4, 2, 5, 3))
        return tf.reshape(x, (1, 2 * rows, 2 * columns, channels))

    @tf.function(input_signature=[tf.TensorSpec((1, None, None, 3), tf.float32)])
    def network(x: Any) -> Any:
        x = skip = prelu(conv(x, "head"), "head_slope")
        for number in range(blocks):
            inner = prelu(conv(x, f"blocks.{number}.first"), f"blocks.{number}.slope")
            x = conv(inner, f"blocks.{number}.second") + x
        x = conv(x, "merge") + skip
        x = prelu(shuffled(conv(x, "up1")), "up1_slope")
        x = prelu(shuffled(conv(x, "up2")), "up2_slope")
        return (tf.tanh(conv(x, "out")) + 1) / 2

    def call(width: int, height: int) -> Any:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        return network(tf.constant(image[None] / np.float32(255))).numpy()

    side = min(1.0, (WARM_UP_PX / (width * height)) ** 0.5)
    for _ in range(2):
        call(round(width * side), round(height * side))
    started = time.perf_counter()
    call(width, height)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
