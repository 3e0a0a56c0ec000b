"""One fresh process that runs only the matrix products of a training step; prints one JSON object.

Usage: floor.py LIBRARY LAYERS WIDTH INNER HEADS BATCH SEQ STEPS THREADS, LIBRARY = numpy | torch | onnxruntime.

Per layer: four products of width x width and two of width x inner, forward and backward (the gradient of the input; frozen
weights have none), and attention's two products, forward and twice backward. The lowest layer's products for the gradient of
its input are left out, as nobody needs it. LoRA's thin products are left out too, weights lie as the library likes them and
results go where earlier ones went: the floor is below what any implementation on that library can reach.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Product = tuple[str, str]
Shapes = dict[str, tuple[int, ...]]
Step = Callable[[], Mapping[Product, Any]]
"""Multiplies all, and gives where the results lie, as arrays."""


def main() -> None:
    """Multiply, and print the time of a step's products."""
    library = sys.argv[1]
    layers, width, inner, heads, batch, seq, steps, threads = map(int, sys.argv[2:])
    shapes: Shapes = {
        "x": (batch * seq, width),
        "h": (batch * seq, inner),
        "square": (width, width),
        "up": (width, inner),
        "down": (inner, width),
        "q": (batch * heads, seq, width // heads),
        "k": (batch * heads, width // heads, seq),
        "scores": (batch * heads, seq, seq),
    }
    step = LIBRARIES[library](shapes, products(layers), threads)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"step_ms": 1e3 * statistics.median(seconds[1:])}))


def products(layers: int) -> list[Product]:
    """The operands of every product of a step, in order."""
    feed_forward, attention = [("x", "up"), ("h", "down")], [("q", "k"), ("scores", "q")]
    found = layers * [*(4 * [("x", "square")]), *feed_forward, *attention]
    for layer in reversed(range(layers)):
        squares = 4 if layer else 1
        found += [*(squares * [("x", "square")]), *feed_forward, *attention, *attention]
    return found


def in_numpy(shapes: Shapes, wanted: list[Product], _threads: int) -> Step:
    """With whatever BLAS numpy was built with."""
    a, out = _draw(shapes), _results(shapes, wanted)

    def step() -> Mapping[Product, Any]:
        for left, right in wanted:
            np.matmul(a[left], a[right], out=out[left, right])
        return out

    return step


def in_torch(shapes: Shapes, wanted: list[Product], threads: int) -> Step:
    """With torch's, out of autograd's sight."""
    import torch

    torch.set_num_threads(threads)
    a = {name: torch.from_numpy(array) for name, array in _draw(shapes).items()}
    out = {product: torch.from_numpy(array) for product, array in _results(shapes, wanted).items()}

    def step() -> Mapping[Product, Any]:
        for left, right in wanted:
            torch.matmul(a[left], a[right], out=out[left, right])
        return out

    return step


def in_onnxruntime(shapes: Shapes, wanted: list[Product], threads: int) -> Step:
    """One session of MatMul nodes alone, everything bound; weights are inputs, as in our graphs."""
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(threads, 1)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    # Optimised, equal products would be computed once.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(_model(shapes, wanted), options, providers=["CPUExecutionProvider"])
    arrays, binding = _results(shapes, wanted), session.io_binding()
    given = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in _draw(shapes).items()}
    out = {product: ort.OrtValue.ortvalue_from_numpy(array) for product, array in arrays.items()}
    for name, value in given.items():
        binding.bind_ortvalue_input(name, value)
    for i, product in enumerate(wanted):
        binding.bind_ortvalue_output(f"product_{i}", out[product])

    def step(_alive: object = (given, out)) -> Mapping[Product, Any]:  # a binding does not keep its values
        session.run_with_iobinding(binding)
        return arrays

    return step


def _model(shapes: Shapes, wanted: list[Product]) -> bytes:
    from onnx import TensorProto, helper

    def row(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [helper.make_node("MatMul", product, [f"product_{i}"]) for i, product in enumerate(wanted)]
    outputs = [row(f"product_{i}", _result(shapes, product)) for i, product in enumerate(wanted)]
    graph = helper.make_graph(nodes, "floor", [row(n, s) for n, s in shapes.items()], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def _draw(shapes: Shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def _results(shapes: Shapes, wanted: list[Product]) -> dict[Product, np.ndarray]:
    return {product: np.empty(_result(shapes, product), np.float32) for product in set(wanted)}


def _result(shapes: Shapes, product: Product) -> tuple[int, ...]:
    left, right = (shapes[name] for name in product)
    return (*left[:-1], right[-1])


LIBRARIES: dict[str, Callable[[Shapes, list[Product], int], Step]] = {
    "numpy": in_numpy,
    "torch": in_torch,
    "onnxruntime": in_onnxruntime,
}

if __name__ == "__main__":
    main()
