"""A section as ONNX graphs: each computes what its purpose says, at sizes that no trace used, from the ports it declares."""

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest
import torch
from plain_models import Classifier, program
from torch import Tensor

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.graph_file import GraphFile, GraphFiles
from fleetune.exporters.model.quantize import FORMS, with_forms
from fleetune.exporters.model.sections import Argument, SectionFunction, block
from fleetune.exporters.onnx.graphs import block_graphs, head_graphs, prelude_graphs

SIZES = (3, 37)
Values = dict[tuple[str, int], np.ndarray]


@pytest.fixture(scope="module")
def section() -> SectionFunction:
    torch.manual_seed(0)
    made = program(Classifier((0.5,)))
    return block(find_anatomy(made, batch=3, seq=37).calls[0], prefix="blocks.0.")


@pytest.fixture(scope="module")
def graphs(section: SectionFunction) -> GraphFiles:
    return block_graphs(section, sizes=SIZES)


def examples(section: SectionFunction, batch: int, seq: int) -> list[Tensor]:
    new = dict(zip(SIZES, (batch, seq), strict=True))
    generator = torch.Generator().manual_seed(batch + seq)
    return [
        torch.randn([new.get(n, n) for n in a.example.shape], generator=generator) if a.is_data else a.example
        for a in section.arguments
    ]


def run(graph: GraphFile, values: Values) -> Values:
    """Feed the ports that the file declares, by name, and return what comes out by role."""
    options = ort.SessionOptions()
    session = ort.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == [port.name for port in graph.inputs]
    feeds = {port.name: values[port.role, port.index] for port in graph.inputs}
    found = session.run([port.name for port in graph.outputs], feeds)
    return {(port.role, port.index): value for port, value in zip(graph.outputs, found, strict=True)}


def assert_close(found: Values, expected: Values, roles: Sequence[str]) -> None:
    assert {role for role, _ in found if role != "saved"} == set(roles)
    for key, value in found.items():
        if key[0] != "saved":
            np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 9)])
def test_each_graph_of_a_block_gives_what_its_purpose_says(
    section: SectionFunction, graphs: GraphFiles, sizes: tuple[int, int]
) -> None:
    given = examples(section, *sizes)
    values = {(a.role, a.index): v.detach().numpy() for a, v in zip(section.arguments, given, strict=True)}
    results = section.function(*given)
    expected = {key: v.detach().numpy() for key, v in zip(section.results, results, strict=True)}
    saved = run(graphs["forward_save"], values)
    every = values | {key: v for key, v in saved.items() if key[0] == "saved"}
    assert_close(saved, expected, ["hidden"])
    assert_close(run(graphs["forward"], values), expected, ["hidden"])
    for purpose in ("backward", "backward_recompute"):
        assert_close(run(graphs[purpose], every), expected, ["d_hidden", "d_weight"])
    for purpose in ("backward_lowest", "backward_lowest_recompute"):
        assert_close(run(graphs[purpose], every), expected, ["d_weight"])


def test_a_backward_reads_no_gradient_free_input_and_only_it_reads_what_was_saved(graphs: GraphFiles) -> None:
    roles = {purpose: {port.role for port in graph.inputs} for purpose, graph in graphs.items()}
    assert {p for p, found in roles.items() if "d_hidden" in found} == {p for p in roles if "backward" in p}
    assert {p for p, found in roles.items() if "saved" in found} == {"backward", "backward_lowest"}
    kept = {p.index: p for p in graphs["forward_save"].outputs if p.role == "saved"}
    for port in graphs["backward"].inputs:
        if port.role == "saved":
            assert (port.dtype, port.shape) == (kept[port.index].dtype, kept[port.index].shape)


def test_ports_say_what_varies(graphs: GraphFiles) -> None:
    shapes = {port.role: port.shape for port in graphs["forward"].inputs if port.role != "weight"}
    assert shapes == {"hidden": ("batch", "seq", 16), "side": ("batch", 1, "seq")}


def small() -> SectionFunction:
    """A block of one frozen matrix and one that learns."""
    arguments = (
        Argument("hidden", 0, torch.randn(3, 37, 4)),
        Argument("d_hidden", 0, torch.randn(3, 37, 4)),
        Argument("weight", 0, torch.randn(4, 4), "frozen"),
        Argument("weight", 1, torch.randn(4, 4), "learning"),
    )

    def function(x: Tensor, dy: Tensor, frozen: Tensor, learning: Tensor) -> tuple[Tensor, ...]:
        return (
            (x @ frozen).exp() @ learning,
            dy @ frozen.t(),
            (x @ frozen).flatten(0, 1).t() @ dy.flatten(0, 1),
        )

    results = (("hidden", 0), ("d_hidden", 0), ("d_weight", 1))
    return SectionFunction("blocks.0", function, arguments, results, ("frozen", "learning"))


def test_two_conversions_are_equal_to_the_byte() -> None:
    assert block_graphs(small(), sizes=SIZES) == block_graphs(small(), sizes=SIZES)


@pytest.mark.parametrize(
    ("base_dtype", "dtypes"),
    [("fp16", {"frozen:fp16": "float16"}), ("int8", {"frozen:int8": "int8", "frozen:scale": "float32"})],
)
def test_frozen_weights_come_in_as_their_form_in_the_slot_of_that_form(
    base_dtype: str, dtypes: dict[str, str]
) -> None:
    section = small()
    graph = block_graphs(section, sizes=SIZES, base_dtype=base_dtype)["forward"]
    slots = with_forms(section.slots)
    found = {slots[p.index]: p.dtype for p in graph.inputs if p.role == "weight"}
    assert found == {**dtypes, "learning": "float32"}
    assert len(slots) == len(FORMS) * len(section.slots)


def test_outside_of_the_blocks_int8_is_storage_alone() -> None:
    weight = torch.randn(4, 4)
    arguments = (Argument("hidden", 0, torch.randn(3, 37, 4)), Argument("weight", 0, weight, "w"))
    outside = SectionFunction("prelude", lambda x, w: (x @ w,), arguments, (("hidden", 0),), ("w",))
    (graph,) = prelude_graphs(outside, sizes=SIZES, base_dtype="int8").values()
    assert [port.dtype for port in graph.inputs] == ["float32", "int8", "float32"]
    assert b"MatMulInteger" not in graph.content
    (graph,) = prelude_graphs(outside, sizes=SIZES, base_dtype="fp16").values()
    assert [port.dtype for port in graph.inputs] == ["float32", "float16"]


def test_predicting_needs_no_labels() -> None:
    arguments = (
        Argument("hidden", 0, torch.randn(3, 37, 4)),
        Argument("batch", 0, torch.zeros(3, dtype=torch.int64), "labels"),
    )

    def function(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = x.mean(1)
        return (logits.sum(1) - labels).sum(), logits

    section = SectionFunction("head", function, arguments, (("loss", 0), ("logits", 0)), ())
    graphs = head_graphs(section, sizes=SIZES)
    assert [port.role for port in graphs["predict"].inputs] == ["hidden"]
    assert [port.role for port in graphs["train"].inputs] == ["hidden", "batch"]
    assert [port.role for port in graphs["predict"].outputs] == ["logits"]


def test_a_size_that_only_the_labels_were_asked_for_is_read_off_the_hidden_stream() -> None:
    """As decoders do that pick one token of each row: logits[arange(batch), …]."""
    arguments = (
        Argument("hidden", 0, torch.randn(3, 37, 4)),
        Argument("batch", 2, torch.zeros(3, 37, dtype=torch.int64), "labels"),
    )

    def function(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = x.sum(1) / labels.shape[1] * torch.arange(labels.shape[0])[:, None]
        return (logits.sum() * labels).sum(), logits

    section = SectionFunction("head", function, arguments, (("loss", 0), ("logits", 0)), ())
    graph = head_graphs(section, sizes=SIZES)["predict"]
    assert [port.role for port in graph.inputs] == ["hidden"]
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    found = run(graph, {("hidden", 0): x})["logits", 0]
    np.testing.assert_allclose(found, x.mean(1) * np.arange(2)[:, None], rtol=1e-5)


def test_outputs_that_are_one_value_or_an_input_get_values_of_their_own() -> None:
    hidden = (Argument("hidden", 0, torch.randn(3, 37, 4)),)
    results = (("hidden", 0), ("side", 0), ("side", 1))
    section = SectionFunction("prelude", lambda x: (x, x * 2, x * 2), hidden, results, ())
    (graph,) = prelude_graphs(section, sizes=SIZES).values()
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    found = run(graph, {("hidden", 0): x})
    assert all(
        np.array_equal(found[key], value) for key, value in zip(results, (x, x * 2, x * 2), strict=True)
    )
    assert len({port.name for port in (*graph.inputs, *graph.outputs)}) == 4


def test_a_trace_that_fixed_a_size_is_refused() -> None:
    hidden = (Argument("hidden", 0, torch.randn(3, 37, 4)),)
    section = SectionFunction("blocks.2", lambda x: (x + torch.ones(3, 1, 1),), hidden, (("hidden", 0),), ())
    with pytest.raises(ExportError, match=r"blocks\.2: the trace fixed the batch size of"):
        prelude_graphs(section, sizes=SIZES)


def test_an_operator_without_translation_is_named() -> None:
    hidden = (Argument("hidden", 0, torch.randn(3, 37, 4)),)
    section = SectionFunction("it", lambda x: (torch.special.bessel_j0(x),), hidden, (("hidden", 0),), ())
    with pytest.raises(ExportError, match=r"it: no ONNX translation: .*bessel_j0"):
        prelude_graphs(section, sizes=SIZES)
