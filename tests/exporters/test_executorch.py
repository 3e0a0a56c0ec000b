"""The ExecuTorch backend: decompositions, cut and loader by themselves, then whole artifacts against torch."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import plain_models
import pytest
import torch
from torch import nn
from torch.fx import Interpreter

from fleetune.device_runtime.commands.selfcheck import relative_error, selfcheck
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.engine import executorch_graphs as loader
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ArtifactError, ConfigError, ExportError
from fleetune.exporters.executorch import decompositions as executorch_decompositions
from fleetune.exporters.executorch import graphs as executorch_graphs
from fleetune.exporters.executorch import lowering as executorch_lowering
from fleetune.exporters.executorch.cut import inputs_of, outputs_of, part, saved_values
from fleetune.exporters.executorch.tidy import tidy
from fleetune.exporters.model import sections
from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.golden import torch_step
from fleetune.exporters.model.mincut import FREE, Candidate, cheapest
from fleetune.exporters.model.program import Program, traced_sizes
from fleetune.exporters.model.sections import Argument, SectionFunction
from fleetune.exporters.model.tracing import trace
from fleetune.exporters.writing import Description, write_artifact

aten = torch.ops.aten
X = torch.linspace(-5, 6, 4 * 5 * 6).reshape(4, 5, 6)
SMALL = torch.cat(
    [torch.tensor([0.0, -0.0, 1e-38, -1e-20, 90.0, -90.0]), torch.linspace(-9, 9, 114)]
).reshape(4, 5, 6)


def slope_of_gelu(approximate: str) -> torch.Tensor:
    """torch's own gradient at SMALL, zero and large values included."""
    return aten.gelu_backward(X, SMALL, approximate=approximate)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (executorch_decompositions.mm(X[0], X[1].T), X[0] @ X[1].T),
        (executorch_decompositions.addmm(X[0, :, 0], X[0], X[1].T, beta=2, alpha=3), 2 * X[0, :, 0] + 3 * X[0] @ X[1].T),
        (executorch_decompositions.total(X, [-1], True), X.sum(-1, True)),
        (executorch_decompositions.total(X, [0, 1]), X.sum((0, 1))),
        (executorch_decompositions.total(X, None), X.sum()),
        (executorch_decompositions.mean(X, [1, 2], True), X.mean((1, 2), True)),
        (executorch_decompositions.power(X, 3), X**3),
        (executorch_decompositions.erf(X), torch.erf(X)),
        (executorch_decompositions.gelu(X, approximate="tanh"), nn.functional.gelu(X, approximate="tanh")),
        (executorch_decompositions.gelu_backward(X, SMALL), slope_of_gelu("none")),
        (executorch_decompositions.gelu_backward(X, SMALL, approximate="tanh"), slope_of_gelu("tanh")),
        (executorch_decompositions.layer_norm(X, (6,), X[0, 0], None, 1e-5)[0], nn.functional.layer_norm(X, (6,), X[0, 0])),
    ],
    ids=["mm", "addmm", "sum-last", "sum-first", "sum-all", "mean", "power", "erf", "gelu-tanh", "gelu-slope",
         "gelu-tanh-slope", "layer-norm"],
)  # fmt: skip
def test_a_decomposition_computes_the_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert relative_error(found.numpy(), expected.numpy()) < 2e-5


@pytest.mark.parametrize(
    ("function", "linears", "inputs_of_linear"),
    [
        (lambda x, w, b: nn.functional.linear(x, w, b), 1, 3),
        (lambda x, w, b: nn.functional.linear(x, w) + torch.exp(b), 1, 2),
        (lambda x, w, b: nn.functional.linear(x, w) + nn.functional.linear(x, w.relu(), b).relu(), 2, 3),
        (lambda x, w, b: torch.add(nn.functional.linear(x, w), b, alpha=2), 1, 2),
    ],
    ids=["bias", "bias-made-later", "two", "scaled"],
)
def test_a_product_with_a_turned_matrix_is_linear(function: Any, linears: int, inputs_of_linear: int) -> None:
    given = [torch.randn(3, 37, 5), torch.randn(4, 5), torch.randn(4)]
    program = trace(
        lambda *a: (function(*a),), given, what="it", sizes=(3, 37), data=[True, False, False], bounds=(8, 64),
        decompositions=executorch_decompositions.DECOMPOSITIONS,
    )  # fmt: skip
    tidy(program.graph)
    found = [n for n in program.graph.nodes if n.target is aten.linear.default]
    assert len(found) == linears
    assert max(len(n.args) for n in found) == inputs_of_linear
    assert not {aten.bmm.default, aten.permute_copy.default} & {n.target for n in program.graph.nodes}
    given[0] = torch.randn(2, 9, 5)
    (result,) = Interpreter(program.graph_module).run(*given)
    torch.testing.assert_close(result, function(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [[1], [0, 2]])
def test_a_sum_in_the_middle_is_left_alone(dims: list[int]) -> None:
    assert executorch_decompositions.total(X, dims) is NotImplemented


def test_the_cheapest_cut_by_hand() -> None:
    wide = Candidate("wide", 400, ("x",), needed=False)
    narrow = Candidate("narrow", 40, None, needed=False)
    again = Candidate("again", 400, ("wide", "narrow"), needed=True)
    assert cheapest([Candidate("x", FREE, None, needed=False), wide, narrow, again]) == ["x", "narrow"]


@pytest.fixture(scope="module")
def block() -> tuple[SectionFunction, tuple[int, int]]:
    torch.manual_seed(0)
    program = plain_models.program(plain_models.Classifier((0.25, 0.5)))
    sizes = traced_sizes(program)
    return sections.block(find_anatomy(program, batch=sizes[0], seq=sizes[1]).calls[0], prefix=""), sizes


def examples(section: SectionFunction, sizes: tuple[int, int], batch: int, seq: int) -> list[torch.Tensor]:
    """The section's arguments at another batch and sequence size."""
    new = dict(zip(sizes, (batch, seq), strict=True))
    generator = torch.Generator().manual_seed(batch + seq)
    return [
        torch.randn([new.get(n, n) for n in a.example.shape], generator=generator) if a.is_data else a.example
        for a in section.arguments
    ]


def test_forward_and_backward_of_the_cut_equal_the_joint_graph(
    block: tuple[SectionFunction, tuple[int, int]],
) -> None:
    section, sizes = block
    data = [a.is_data for a in section.arguments]
    given = [a.example for a in section.arguments]
    program = trace(
        section.function, given, what="block", sizes=sizes, data=data, bounds=(8, 64),
        decompositions=executorch_decompositions.DECOMPOSITIONS,
    )  # fmt: skip
    tidy(program.graph)
    used = {n.target for n in program.graph.nodes}
    assert {aten.bmm.default, aten.linear.default} <= used
    assert not used & {aten.mm.default, aten.addmm.default, aten.native_layer_norm.default, aten.erf.default}
    assert not used & {aten.alias.default, aten.unsqueeze.default, aten.clone.default, aten.permute.default}
    inputs, outputs = inputs_of(program), outputs_of(program)
    saved = saved_values(program.graph, inputs[1], extents={})
    assert all(n.meta["val"].dtype == torch.float32 for n in saved)
    assert len(saved) < 12
    forward, backward = (
        part(program, inputs, [outputs[0], *saved]),
        part(program, [*inputs, *saved], outputs[1:]),
    )
    whole = [n.name for n in inputs]
    values = dict(zip(whole, examples(section, sizes, 2, 9), strict=True))
    found = Interpreter(forward.graph_module).run(*(values[n] for n in forward.graph_signature.user_inputs))
    values |= dict(zip([n.name for n in saved], found[1:], strict=True))
    gradients = Interpreter(backward.graph_module).run(
        *(values[n] for n in backward.graph_signature.user_inputs)
    )
    expected = section.function(*(values[n] for n in whole))
    for one, other in zip((found[0], *gradients), expected, strict=True):
        assert relative_error(one.detach().numpy(), other.detach().numpy()) < 1e-5


def test_what_a_router_chose_is_kept_as_positions() -> None:
    def largest(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            y = x.topk(2).values
            return (y, *torch.autograd.grad(y, x, dy))

    given = [torch.randn(3, 37, 5), torch.randn(3, 37, 2)]
    program = trace(largest, given, what="it", sizes=(3, 37), data=[True, True], bounds=(8, 64))
    tidy(program.graph)
    (kept,) = saved_values(program.graph, inputs_of(program)[1], extents={})
    assert kept.meta["val"].dtype == torch.int64


def test_every_product_is_delegated_and_the_loader_runs_it(
    block: tuple[SectionFunction, tuple[int, int]], tmp_path: Path
) -> None:
    section, sizes = block
    traced = executorch_graphs.Traced(section, sizes)
    assert traced.bounds == {"batch": 16, "seq": 128}
    gradients = traced.leaving("d_hidden", "d_weight")
    lowered = executorch_lowering.lower(traced.part(traced.entering(), gradients), what="block")
    assert (
        not {"aten::bmm", "aten::mm", "aten::addmm", "aten::add", "aten::mul", "aten::_softmax"}
        & lowered.portable.keys()
    )
    (tmp_path / "block.pte").write_bytes(lowered.content)
    graph = loader.ExecutorchGraph(tmp_path / "block.pte")
    names = traced.part(traced.entering(), gradients).graph_signature.user_inputs
    for batch, seq in ((1, 1), (3, 20), (16, 128)):
        given = examples(section, sizes, batch, seq)
        values = dict(zip([end.node.name for end in traced.entering()], given, strict=True))
        feeds = {n: loader.value_of(values[n].detach().numpy()) for n in names}
        found = [loader.array_of(v) for v in graph.run(feeds, [str(i) for i in range(len(gradients))])]
        for one, other in zip(found, section.function(*given)[1:], strict=True):
            assert relative_error(one, other.detach().numpy()) < 1e-4
    too_large = examples(section, sizes, 17, 128)
    values = dict(zip([end.node.name for end in traced.entering()], too_large, strict=True))
    with pytest.raises(ArtifactError, match="bounds"):
        graph.run({n: values[n].detach() for n in names}, ["a"])


def test_what_writes_into_its_input_is_made_functional() -> None:
    hidden = Argument("hidden", 0, torch.randn(3, 37, 4))

    def halve(x: torch.Tensor) -> tuple[torch.Tensor]:
        y = x * x
        y /= 2
        return (y,)

    traced = executorch_graphs.Traced(SectionFunction("it", halve, (hidden,), (("hidden", 0),), ()), (3, 37))
    program = traced.part(traced.entering(), traced.leaving())
    x = torch.randn(2, 9, 4)
    torch.testing.assert_close(Interpreter(program.graph_module).run(x)[0], halve(x)[0])


def test_a_size_is_there_before_every_reshape_that_uses_it() -> None:
    def late(x: torch.Tensor) -> tuple[torch.Tensor]:
        doubled = torch.cat([x, x]).unsqueeze(1)  # nothing has computed twice the batch yet
        return (doubled.exp().view(x.shape[0] * 2, -1, 2),)

    given = [torch.randn(3, 37, 4)]
    program = trace(late, given, what="it", sizes=(3, 37), data=[True], bounds=(8, 64))
    tidy(program.graph)
    program.graph.lint()
    x = torch.randn(2, 9, 4)
    torch.testing.assert_close(Interpreter(program.graph_module).run(x)[0], late(x)[0])


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture(scope="module")
def doubling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that doubles six numbers."""
    path = tmp_path_factory.mktemp("doubling") / "doubling.pte"
    program = torch.export.export(Doubling(), (torch.zeros(6),))
    path.write_bytes(executorch_lowering.lower(program, what="doubling").content)
    return path


def test_a_result_stays_when_the_graph_runs_again(doubling: Path) -> None:
    graph = loader.ExecutorchGraph(doubling)
    (first,) = graph.run({"x": torch.ones(6)}, ["y"])
    (second,) = graph.run({"x": torch.full((6,), 5.0)}, ["y"])
    assert (loader.array_of(first) == 2).all()
    assert (loader.array_of(second) == 10).all()


STEPS_OF_MEMORY = """
import resource, sys, torch
from pathlib import Path
from fleetune.device_runtime.engine.executorch_graphs import ExecutorchGraph
graph = ExecutorchGraph(Path(sys.argv[1]))
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [[torch.ones(n << 16) for n in (6, 24, 6, 24, 6, 6)] for _ in range(6)]
    while kept:
        kept.pop()
        torch.ones(6 << 16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Takes and frees memory as steps of six layers do; prints the page faults of the last."""


def cold(code: str, *arguments: str) -> str:
    """The last line that a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_a_step_frees_is_there_for_the_next(doubling: Path) -> None:
    assert int(cold(STEPS_OF_MEMORY, str(doubling))) < 1000  # 4193 as glibc comes


def test_a_device_never_loads_the_exporter(doubling: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from fleetune.device_runtime.engine.executorch_graphs import ExecutorchGraph as Graph; "
        "Graph(Path(sys.argv[1])); print([n for n in sys.modules if n.startswith('executorch.exir')])"
    )
    assert cold(code, str(doubling)) == "[]"


def test_a_traced_program_is_not_decomposed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    program = torch.export.export(Doubling(), (torch.zeros(6),))
    decomposed: list[object] = []
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", lambda *_: decomposed.append(1))
    executorch_lowering.lower(program, what="doubling")
    assert not decomposed


def test_xnnpack_runs_one_of_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    xnnpack = import_module("executorch.backends.xnnpack.xnnpack_preprocess")
    real = xnnpack.XNNPACKPassManager
    monkeypatch.setattr(
        xnnpack, "XNNPACKPassManager", lambda program, passes: seen.append(passes) or real(program, passes)
    )
    program = torch.export.export(Doubling(), (torch.zeros(6),))
    executorch_lowering.lower(program, what="doubling")
    assert [[p.__name__ for p in passes] for passes in seen] == [["ConvertToLinearPass"]]


def test_a_type_that_xnnpack_lacks_is_refused_at_export() -> None:
    half = Argument("weight", 0, torch.zeros(2, 2, dtype=torch.float16), "layer.weight")
    section = SectionFunction("blocks.0", lambda w: (w,), (half,), (("hidden", 0),), ("layer.weight",))
    with pytest.raises(
        ExportError, match=r"blocks\.0: the executorch backend takes float32.*layer\.weight is float16"
    ):
        executorch_graphs.prelude_graphs(section, sizes=(3, 37))


def test_a_host_without_executorch_is_told_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(executorch_lowering, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'fleetune\[executorch\]'.*executorch==1\.4\.1"):
        executorch_lowering.require()


@pytest.fixture
def no_executorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    loader._load.cache_clear()
    monkeypatch.setattr(loader, "import_module", missing)
    yield
    loader._load.cache_clear()


@pytest.mark.usefixtures("no_executorch")
def test_a_device_without_executorch_is_told_the_command() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'fleetune\[executorch\]'"):
        loader.set_threads(1)


@pytest.mark.parametrize("array", [np.float32(3), np.arange(6.0).reshape(2, 3).T], ids=["scalar", "turned"])
def test_a_value_keeps_its_shape_and_content(array: np.ndarray) -> None:
    value = loader.value_of(np.asarray(array))
    assert value.is_contiguous()
    np.testing.assert_array_equal(loader.array_of(value), array, strict=True)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pte").write_bytes(b"no program" * 100)
    with pytest.raises(ArtifactError, match=r"bad\.pte: ExecuTorch cannot open it"):
        loader.ExecutorchGraph(tmp_path / "bad.pte")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    torch.manual_seed(0)
    program = plain_models.program(plain_models.Classifier((0.25, 0.25, 0.25)))
    folder = tmp_path_factory.mktemp("executorch") / "artifact"
    description = Description("plain", "Classifier", "sequence-classification", tuple("abcde"), {})
    write_artifact(program, description, folder, backend="executorch")
    return folder, program


@pytest.mark.slow
def test_any_plan_equals_torch_with_the_identity(artifact: tuple[Path, Program]) -> None:
    folder, program = artifact
    assert selfcheck(folder).max_relative_error < 1e-5
    opened = open_artifact(folder)
    assert opened.manifest.bounds == {"batch": 16, "seq": 128}
    graphs = opened.manifest.kinds[0].graphs
    roles = {purpose: {port.role for port in graph.outputs} for purpose, graph in graphs.items()}
    assert roles["backward_lowest"] == roles["backward_lowest_recompute"] == {"d_weight"}
    assert roles["backward"] == roles["backward_recompute"] == {"d_weight", "d_hidden"}
    anatomy = find_anatomy(program, batch=3, seq=7)
    for recompute, dropped, sizes in (
        (False, (), (1, 1)),
        (True, (1,), (5, 21)),
        (False, (0, 2), (16, 128)),
        (False, (0, 1, 2), (2, 9)),
    ):
        data = program.make_batch(*sizes)
        expected = torch_step(program, anatomy, data, dropped=dropped)
        with open_engine(opened, memory=RECOMPUTE if recompute else SAVE_ALL) as stack:
            plan = dropping(3, dropped)
            result = stack.step({n: v.numpy() for n, v in data.items()}, plan, opened.adapter())
        assert relative_error(np.float32(result.loss), expected.pop("loss").numpy()) < 1e-5
        expected.pop("logits")
        assert {f"grad.{n}" for n in result.grads} == expected.keys()
        for name, gradient in result.grads.items():
            assert relative_error(gradient, expected[f"grad.{name}"].numpy()) < 1e-4, name


@pytest.mark.slow
def test_a_batch_beyond_the_bounds_is_refused_by_name(artifact: tuple[Path, Program]) -> None:
    folder, program = artifact
    opened = open_artifact(folder, verify=False)
    batch = {n: v.numpy() for n, v in program.make_batch(17, 8).items()}
    with open_engine(opened) as stack, pytest.raises(ArtifactError, match="batch 17: at most 16"):
        stack.step(batch, dropping(3, ()), opened.adapter())
