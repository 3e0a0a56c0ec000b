"""Every pass keeps what its row promises, in every case that it names; beside that, what single passes do and leave alone."""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from fleetune.device_runtime.errors import ExportError, UnknownName
from fleetune.exporters.model.quantize import LARGEST, derive, rounded
from fleetune.exporters.onnx.passes import PASSES, apply, fuse, simplify, store, tidy
from fleetune.exporters.onnx.passes.frozen import forms_of, frozen_inputs, mark_frozen

SIZES = {"B": 2, "S": 5, "M": 40}
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


STEP = """(float[M,64] hidden_0, float[M,32] d_hidden_0, float[32,64] w, float[32] bias) => (float[M,32] y, float[M,64] dx)
<float[64,32] wt> { wt = Transpose <perm = [1, 0]> (w)  y = Gemm(hidden_0, wt, bias)  dx = MatMul(d_hidden_0, w) }"""


class Case(NamedTuple):
    """A graph in which a pass finds something to do; ``frozen`` names weights, ``first`` what runs before."""

    text: str
    frozen: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


LOOKUP = Case(
    "(int64[B,S] ids, float[9,64] table) => (float[B,S,64] y) { y = Gather(table, ids) }", ("table",)
)
LARGE = Case(
    """(float[B,64] x, float[B,70000] dy, float[70000,64] w, float[70000] bias) => (float[B,70000] y, float[B,64] dx)
    <float[64,70000] wt> { wt = Transpose <perm = [1, 0]> (w)  y = Gemm(x, wt, bias)  dx = MatMul(dy, w) }""",
    ("w",),
)
CASES: dict[str, list[Case]] = {
    "tidy": [
        Case("(float[B,8] x) => (float[B,8] y) <float[B,8] t> { y = Exp(t)  t = Neg(x) }"),
        Case("(float[B,8] x) => (float[B,8] y) <float[B,8] t> { t = Identity(x)  y = Exp(t) }"),
        Case(
            "(float[B,8] x) => (float[B,8] y) <float[B,8] t, float[B,8] u> { t = Exp(x)  u = Exp(x)  y = Add(t, u) }"
        ),
        Case("(float[B,8] x) => (float[B,8] y) <float[B,8] t> { y = Exp(x)  t = Neg(x) }"),
    ],
    "early_shapes": [
        Case(
            """(float[B,S,8] hidden_0, float[B,S,8] d_hidden_0) => (int64[3] n, float[B,S,8] dx)
            { n = Shape(d_hidden_0)  dx = Mul(d_hidden_0, hidden_0) }"""
        ),
        Case(
            """(float[B,S,8] hidden_0, int64[S,B] turned) => (int64[1] n, int64[1] m, int64[S,B] y)
            { n = Shape<start=1, end=2>(turned)  m = Shape<start=0, end=1>(turned)  y = Neg(turned) }"""
        ),
    ],
    "half_of_erf": [Case(GELU)],
    "folded_gauss": [Case(GELU)],
    "gelu_from_slope": [Case(GELU, first=("half_of_erf",))],
    "scaled_products": [
        Case(
            """(float[B,S,8] x, float[8,4] a) => (float[M,4] out)
            <float[B,S,4] y, float[M,4] r, float[M,4] r2, float two = {2.0}, int64[2] shape = {-1, 4}>
            { y = MatMul(x, a)  r = Reshape(y, shape)  r2 = Mul(r, two)  out = Neg(r2) }"""
        ),
        Case(
            """(float[B,S,8] x, float[8,4] a, float[8,2] b) => (float[B,S,4] y, float[B,S,2] z)
            <float[B,S,8] twice, float two = {2.0}> { twice = Mul(x, two)  y = MatMul(twice, a)  z = MatMul(twice, b) }"""
        ),
    ],
    "fp16_storage": [
        Case("(int64[B,S] ids, float[9,8] table) => (float[B,S,8] y) { y = Gather(table, ids) }", ("table",)),
        Case("(float[B,8] x, float[8,4] w) => (float[B,4] y) { y = MatMul(x, w) }", ("w",)),
    ],
    "int8_storage": [
        Case("(float[M,64] x, float[64,32] w) => (float[M,32] y) { y = MatMul(x, w) }", ("w",)),
        Case(STEP, ("w",)),
    ],
    "row_tables": [LOOKUP],
    "row_matrices": [Case(STEP, ("w",)), LARGE],
    "int4_tables": [LOOKUP],
    "int4_matrices": [Case(STEP, ("w",)), LARGE],
}
EVERY = [(name, i) for name in PASSES for i in range(len(CASES[name]))]


def model_of(text: str) -> ir.Model:
    return ir.from_onnx_text(TEXT.replace("{}", text.replace("\n", " ")))


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def drawn(model: ir.Model, seed: int, spread: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        shape = [SIZES.get(str(d), d) for d in value.shape]
        if value.dtype == ir.DataType.INT64:
            feeds[value.name] = rng.integers(0, 9, shape)
        else:
            feeds[value.name] = (spread * rng.standard_normal(shape)).astype(np.float32)
    return feeds


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def ports(values) -> list[tuple[str, str, str]]:
    return [(v.name, str(v.dtype), str(v.shape)) for v in values]


def prepared(case: Case) -> ir.Model:
    model = model_of(case.text)
    mark_frozen(v for v in model.graph.inputs if v.name in case.frozen)
    for name in case.first:
        assert apply(name, model)
    return model


def as_kept(feeds: dict[str, np.ndarray], after: ir.Model) -> tuple[dict[str, np.ndarray], ...]:
    """The feeds with weights as their form keeps them, for the model before; and those of the model after."""
    before, stored = {n: v.copy() for n, v in feeds.items()}, dict(feeds)
    for name, (weight, form) in forms_of(after).items():
        tensor = torch.from_numpy(before[weight])
        stored[name] = derive(weight, torch.from_numpy(feeds[weight]), form).numpy()
        with rounded({weight: tensor}, [f"{weight}:{form}"]):
            before[weight] = tensor.numpy().copy()
    read = {v.name for v in after.graph.inputs if v.uses()}
    return before, {n: v for n, v in stored.items() if n in read}


@pytest.mark.parametrize(("name", "which"), EVERY)
def test_a_pass_ensures_what_it_says(name: str, which: int) -> None:
    case, ensures = CASES[name][which], PASSES[name].ensures
    before, after = prepared(case), prepared(case)
    assert apply(name, after)
    onnx.checker.check_model(ir.to_proto(after))
    tidy(after)
    after.graph.inputs[:] = [v for v in after.graph.inputs if v.uses() or v.name not in case.frozen]
    free = [v for v in after.graph.inputs if v.name not in forms_of(after)]
    assert ports(free) == ports(v for v in before.graph.inputs if v.name not in case.frozen)
    assert ports(after.graph.outputs) == ports(before.graph.outputs)
    assert ensures.stores == bool(case.frozen)
    for seed in range(3):
        feeds, stored = as_kept(drawn(before, seed), after)
        for a, b in zip(run(before, feeds), run(after, stored), strict=True):
            assert np.abs(b - a).max() <= ensures.within * np.abs(a).max()


@pytest.mark.parametrize(("name", "which"), [at for at in EVERY if not PASSES[at[0]].ensures.stores])
def test_a_pass_leaves_nothing_for_a_second_turn(name: str, which: int) -> None:
    model = prepared(CASES[name][which])
    apply(name, model)
    tidy(model)
    assert not apply(name, model)


@pytest.mark.parametrize("name", PASSES)
def test_every_case_that_a_pass_names_has_an_example(name: str) -> None:
    assert len(re.findall(r"^ +\d+\. ", PASSES[name].run.__doc__, re.M)) == len(CASES[name])


def test_storage_after_fusing_is_refused_in_words() -> None:
    model = prepared(CASES["scaled_products"][0])
    mark_frozen(model.graph.inputs[1:])
    assert fuse(model)
    with pytest.raises(ExportError, match=r"int8_storage: Frozen inputs must be read by standard operators"):
        store(model, "int8")


def test_storing_twice_is_refused_in_words() -> None:
    model = prepared(CASES["fp16_storage"][1])
    assert store(model, "fp16")
    with pytest.raises(ExportError, match="pass fp16_storage: Frozen inputs must be float32"):
        store(model, "fp16")


def test_fp32_stores_nothing_and_an_unknown_storage_is_named() -> None:
    model = prepared(CASES["fp16_storage"][1])
    assert not store(model, "fp32")
    with pytest.raises(UnknownName, match="no storage 'int3'; have: fp16, fp32, int4, int8"):
        store(model, "int3")


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_the_slope_of_gelu_takes_fewer_passes(spread: float) -> None:
    before, model = model_of(GELU), model_of(GELU)
    assert simplify(model)
    assert apply("gelu_from_slope", model)
    tidy(model)
    assert operators(model) == Counter(Mul=4, Erf=1, HardSigmoid=1, Sub=1, Exp=1, Add=1)
    feeds = drawn(before, 0, spread)
    for a, b in zip(run(before, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "text",
    [
        "(float[B,S,8] x) => (float[B,S,8] y) { y = Gelu(x) }",
        GELU.replace('approximate = "none"', 'approximate = "tanh"'),
    ],
    ids=["no slope", "another gelu"],
)
def test_gelu_stays_where_its_half_is_not_made(text: str) -> None:
    model = model_of(text)
    apply("half_of_erf", model)
    assert not apply("gelu_from_slope", model)
    assert operators(model)["Gelu"] == 1


def test_factors_multiply_behind_a_product() -> None:
    text = """(float[B,S,8] x, float[8,4] a) => (float[M,4] out)
    <float[B,S,4] y, float[M,4] r, float[M,4] r2, float[M,4] r3, float two = {2.0}, float three = {3.0},
     int64[2] shape = {-1, 4}, float[4] bias = {1.0, 2.0, 3.0, 4.0}>
    { y = MatMul(x, a)  r = Reshape(y, shape)  r2 = Mul(r, two)  r3 = Mul(three, r2)  out = Add(r3, bias) }"""
    model = model_of(text)
    assert fuse(model)
    (product,) = (n for n in model.graph if n.op_type == "FusedMatMul")
    assert product.attributes["alpha"].as_float() == 6.0
    assert "Mul" not in operators(model)


def test_a_factor_that_something_else_reads_too_stays() -> None:
    text = """(float[B,S,8] x, float[8,8] a) => (float[B,S,8] out)
    <float[B,S,8] twice, float[B,S,8] y, float two = {2.0}>
    { twice = Mul(x, two)  y = MatMul(twice, a)  out = Add(y, twice) }"""
    assert not apply("scaled_products", model_of(text))


def test_fp16_casts_a_matrix_whole_and_of_a_table_the_rows() -> None:
    text = """(int64[B,S] ids, float[9,8] table, float[8,4] w) => (float[B,S,4] y)
    <float[B,S,8] x> { x = Gather(table, ids)  y = MatMul(x, w) }"""
    model = prepared(Case(text, ("table", "w")))
    assert store(model, "fp16")
    lookup = next(n for n in model.graph if n.op_type == "Gather")
    assert lookup.inputs[0].name == "table"
    assert operators(model) == Counter(Gather=1, Cast=2, MatMul=1)
    assert forms_of(model) == {"table": ("table", "fp16"), "w": ("w", "fp16")}
    assert {str(v.dtype) for v in frozen_inputs(model)} == {"FLOAT16"}


def stored_step() -> ir.Model:
    """STEP with its matrix as int8."""
    model = prepared(Case(STEP, ("w",)))
    assert store(model, "int8")
    assert operators(model)["MatMulIntegerToFloat"] == 2
    assert forms_of(model) == {"w_int8": ("w", "int8t"), "w_scale": ("w", "scalet")}
    model.graph.inputs[:] = [v for v in model.graph.inputs if v.uses()]
    return model


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("values", [(255,), (-255,), (-128, 127)])
@pytest.mark.parametrize("signs", [(1,), (-1,), (-1, 1)])
def test_int8_products_of_extremes_are_exact_on_every_processor(
    rows: int, values: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    w = derive("w", torch.tensor(rng.choice(signs, (32, 64)), dtype=torch.float32), "int8t").numpy()
    assert np.abs(w).min() == LARGEST
    x, dy = (rng.choice(values, (rows, width)).astype(np.float32) for width in (64, 32))
    one = np.ones(32, np.float32)
    y, dx = run(stored_step(), {"hidden_0": x, "d_hidden_0": dy, "bias": one, "w_int8": w, "w_scale": one})
    wide = w.astype(np.float64)
    np.testing.assert_array_equal(y, x @ wide + 1)  # all integers below 2**24
    np.testing.assert_allclose(dx, dy @ wide.T, rtol=0, atol=0.25)


def test_int8_gradients_are_near_however_the_rows_differ() -> None:
    model = stored_step()
    feeds = drawn(model_of(STEP.replace("M,", "40,")), 0)
    feeds["d_hidden_0"] *= np.logspace(-9, 0, 40, dtype=np.float32)[:, None]
    feeds["d_hidden_0"][3] = 0
    kept, stored = as_kept(feeds, model)
    _, dx = run(model, stored)
    expected = kept["d_hidden_0"] @ kept["w"]
    rows = np.linalg.norm(dx - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    assert rows.max() < 0.02
    assert not dx[3].any()


def test_a_matrix_that_something_else_reads_too_stays_fp32() -> None:
    text = STEP.replace(
        "dx = MatMul(d_hidden_0, w)", "dx = MatMul(d_hidden_0, w)  sum = ReduceSum(w)"
    ).replace("float[M,64] dx)", "float[M,64] dx, float[1,1] sum)")
    model = prepared(Case(text, ("w",)))
    assert not store(model, "int8")
    assert "MatMulIntegerToFloat" not in operators(model)
