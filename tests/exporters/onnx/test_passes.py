"""Each pass on a hand-made graph: it does its one thing, and onnxruntime computes the same before and after."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from fleetune.exporters.onnx.passes import fuse, tidy
from fleetune.exporters.onnx.passes.fp16_storage import fp16_storage
from fleetune.exporters.onnx.passes.gelu_slope import folded_gauss, gelu_from_slope, half_of_erf
from fleetune.exporters.onnx.passes.int8_products import int8_products
from fleetune.exporters.onnx.passes.scaled_products import scaled_products

SIZES = {"B": 2, "S": 5}
TEXT = '<ir_version: 10, opset_import: ["" : 20]> graph {}'
GELU = """(float[B,S,8] x) => (float[B,S,8] y, float[B,S,8] slope)
<float[B,S,8] t, float[B,S,8] e, float[B,S,8] one_e, float[B,S,8] cdf, float[B,S,8] xx, float[B,S,8] h,
 float[B,S,8] ex, float[B,S,8] pdf, float[B,S,8] xpdf,
 float root = {0.70710677}, float one = {1.0}, float half = {0.5}, float minus = {-0.5}, float c = {0.3989423}> {
  y = Gelu <approximate = "none"> (x)
  t = Mul(x, root)  e = Erf(t)  one_e = Add(e, one)  cdf = Mul(one_e, half)
  xx = Mul(x, x)  h = Mul(xx, minus)  ex = Exp(h)  pdf = Mul(ex, c)
  xpdf = Mul(x, pdf)  slope = Add(cdf, xpdf)
}"""


def model_of(text: str) -> ir.Model:
    return ir.from_onnx_text(TEXT.replace("{}", text.replace("\n", " ")))


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def drawn(model: ir.Model, seed: int, spread: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        v.name: [SIZES.get(str(d), d) for d in v.shape] for v in model.graph.inputs if v.shape is not None
    }
    return {name: (spread * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def agree(text: str, change, *, seeds: int = 3, spread: float = 1.0) -> ir.Model:
    """Apply ``change`` and compare on random inputs."""
    model = model_of(text)
    change(model)
    tidy(model)
    for seed in range(seeds):
        before = model_of(text)
        feeds = drawn(before, seed, spread)
        for a, b in zip(run(before, feeds), run(model, feeds), strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-6, atol=2e-6)
    return model


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_the_slope_of_gelu_takes_fewer_passes(spread: float) -> None:
    def change(model: ir.Model) -> None:
        assert half_of_erf(model)
        assert folded_gauss(model)
        gelu_from_slope(model.graph)

    found = operators(agree(GELU, change, spread=spread))
    assert found == Counter(Mul=4, Erf=1, HardSigmoid=1, Sub=1, Exp=1, Add=1)


def test_gelu_stays_where_no_slope_is_made() -> None:
    model = model_of("(float[B,S,8] x) => (float[B,S,8] y) { y = Gelu(x) }")
    gelu_from_slope(model.graph)
    assert operators(model) == Counter(Gelu=1)


def test_a_factor_goes_into_the_products_that_read_it() -> None:
    text = """(float[B,S,8] x, float[8,4] a, float[8,2] b) => (float[B,S,4] y, float[B,S,2] z)
    <float[B,S,8] twice, float two = {2.0}> { twice = Mul(x, two)  y = MatMul(twice, a)  z = MatMul(twice, b) }"""
    model = agree(text, fuse)
    assert operators(model) == Counter(FusedMatMul=2)


def test_a_factor_goes_into_the_product_that_made_it_and_factors_multiply() -> None:
    text = """(float[B,S,8] x, float[8,4] a) => (float[M,4] out)
    <float[B,S,4] y, float[M,4] r, float[M,4] r2, float[M,4] r3, float two = {2.0}, float three = {3.0},
     int64[2] shape = {-1, 4}, float[4] bias = {1.0, 2.0, 3.0, 4.0}>
    { y = MatMul(x, a)  r = Reshape(y, shape)  r2 = Mul(r, two)  r3 = Mul(three, r2)  out = Add(r3, bias) }"""
    model = agree(text, fuse)
    (product,) = (n for n in model.graph if n.op_type == "FusedMatMul")
    assert product.attributes["alpha"].as_float() == 6.0
    assert "Mul" not in operators(model)


def test_a_factor_that_something_else_reads_too_stays() -> None:
    text = """(float[B,S,8] x, float[8,8] a) => (float[B,S,8] out)
    <float[B,S,8] twice, float[B,S,8] y, float two = {2.0}>
    { twice = Mul(x, two)  y = MatMul(twice, a)  out = Add(y, twice) }"""
    assert not scaled_products(model_of(text))


def test_fp16_casts_a_matrix_whole_and_of_a_table_the_rows() -> None:
    text = """(int64[B,S] ids, float[9,8] table, float[8,4] w) => (float[B,S,4] y)
    <float[B,S,8] x> { x = Gather(table, ids)  y = MatMul(x, w) }"""
    model = model_of(text)
    fp16_storage(model.graph, list(model.graph.inputs)[1:])
    tidy(model)
    lookup = next(n for n in model.graph if n.op_type == "Gather")
    assert lookup.inputs[0].name == "table"
    assert operators(model) == Counter(Gather=1, Cast=2, MatMul=1)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, (2, 5))
    table, w = (rng.standard_normal(s).astype(np.float16) for s in ((9, 8), (8, 4)))
    (found,) = run(model, {"ids": ids, "table": table, "w": w})
    expected = table.astype(np.float32)[ids] @ w.astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


STEP = """(float[M,64] hidden_0, float[M,32] d_hidden_0, float[32,64] w, float[32] bias) => (float[M,32] y, float[M,64] dx)
<float[64,32] wt> { wt = Transpose <perm = [1, 0]> (w)  y = Gemm(hidden_0, wt, bias)  dx = MatMul(d_hidden_0, w) }"""


def test_int8_products_are_near_there_and_back_however_the_rows_differ() -> None:
    model = model_of(STEP)
    (stored,) = int8_products(model.graph, [model.graph.inputs[2]])
    tidy(model)
    assert stored.transposed
    assert operators(model)["MatMulIntegerToFloat"] == 2
    model.graph.inputs[:] = [v for v in model.graph.inputs if v.uses()]
    rng = np.random.default_rng(0)
    x, w, bias = (rng.standard_normal(s).astype(np.float32) for s in ((40, 64), (32, 64), 32))
    dy = (rng.standard_normal((40, 32)) * np.logspace(-9, 0, 40)[:, None]).astype(np.float32)
    dy[3] = 0
    scale = np.abs(w).max(1) / 127
    q = np.round(w / scale[:, None]).astype(np.int8)
    feeds = {"hidden_0": x, "d_hidden_0": dy, "bias": bias, "w_int8": q.T.copy(), "w_scale": scale}
    y, dx = run(model, feeds)
    kept = q * scale[:, None]
    assert np.linalg.norm(y - (x @ kept.T + bias)) < 0.02 * np.linalg.norm(y)
    expected = dy @ kept
    rows = np.linalg.norm(dx - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    assert rows.max() < 0.02
    assert not dx[3].any()


def test_a_matrix_that_something_else_reads_too_stays_fp32() -> None:
    text = STEP.replace(
        "dx = MatMul(d_hidden_0, w)", "dx = MatMul(d_hidden_0, w)  sum = ReduceSum(w)"
    ).replace("float[M,64] dx)", "float[M,64] dx, float[1,1] sum)")
    model = model_of(text)
    assert int8_products(model.graph, [model.graph.inputs[2]]) == []
    assert "MatMulIntegerToFloat" not in operators(model)
