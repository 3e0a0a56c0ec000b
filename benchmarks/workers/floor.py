"""One fresh process that runs only the matrix products of a training step, in numpy; prints one JSON object.

Usage: floor.py LAYERS WIDTH INNER HEADS BATCH SEQ STEPS. Per layer: four products of width x width and two of width x inner,
forward and backward (the gradient of the input; frozen weights have none), and attention's two products, forward and
twice backward. The lowest layer's products for the gradient of its input are left out, as nobody needs it. LoRA's thin
products are left out too: the floor is below what any implementation can reach.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np


def main() -> None:
    """Multiply, and print the time of a step's products."""
    layers, width, inner, heads, batch, seq, steps = map(int, sys.argv[1:])
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    tokens = batch * seq
    x, h = draw(tokens, width), draw(tokens, inner)
    square, up = draw(width, width), draw(inner, width)
    q, scores = draw(batch * heads, seq, width // heads), draw(batch * heads, seq, seq)

    def forward() -> None:
        for _ in range(4):
            x @ square.T
        x @ up.T, h @ up
        q @ q.transpose(0, 2, 1), scores @ q

    def backward(lowest: bool) -> None:
        for _ in range(1 if lowest else 4):
            x @ square
        h @ up, x @ up.T
        for _ in range(2):
            q @ q.transpose(0, 2, 1), scores @ q

    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        _times(layers, forward)
        _times(layers - 1, lambda: backward(False))
        backward(True)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"step_ms": 1e3 * statistics.median(seconds[2:])}))


def _times(count: int, work: Callable[[], None]) -> None:
    for _ in range(count):
        work()


if __name__ == "__main__":
    main()
