"""Any module with a list of blocks exports: here two small transformers that no library knows."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_models import Block, Classifier, export, program
from torch import Tensor, nn

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.commands.selfcheck import relative_error, selfcheck
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode, dropping, full
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.golden import torch_step
from fleetune.exporters.model.program import Program
from fleetune.exporters.writing import Description, write_artifact


def arrays(batch: dict[str, Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in batch.items()}


def test_golden_step_is_replayed(classifier: tuple[Path, Program]) -> None:
    report = selfcheck(classifier[0])
    assert report.ok
    assert report.max_relative_error < 1e-5
    assert {n for n in report.tensors if n.startswith("dropped.grad.blocks.1")} == set()
    assert "full.recompute.grad.blocks.1.down.weight" in report.tensors


def test_blocks_that_differ_in_an_attribute_are_of_two_kinds(classifier: tuple[Path, Program]) -> None:
    manifest = open_artifact(classifier[0]).manifest
    assert [layer.kind for layer in manifest.layers] == [0, 0, 1, 0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropped", [(), (0,), (3,), (0, 1, 2), (1, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 9), (5, 21)])
def test_any_plan_equals_torch_with_the_identity(
    classifier: tuple[Path, Program], batch: int, seq: int, dropped: tuple[int, ...], recompute: bool
) -> None:
    folder, made = classifier
    artifact = open_artifact(folder, verify=False)
    data = made.make_batch(batch, seq)
    anatomy = find_anatomy(made, batch=3, seq=7)
    expected = torch_step(made, anatomy, data, dropped=dropped)
    with open_engine(artifact, memory=RECOMPUTE if recompute else SAVE_ALL) as stack:
        result = stack.step(arrays(data), dropping(4, dropped), artifact.adapter())
    assert relative_error(np.float32(result.loss), expected.pop("loss").numpy()) < 1e-5
    assert relative_error(result.logits, expected.pop("logits").numpy()) < 1e-5
    assert {f"grad.{n}" for n in result.grads} == expected.keys()
    for name, gradient in result.grads.items():
        assert relative_error(gradient, expected[f"grad.{name}"].numpy()) < 2e-5, name


def test_frozen_layers_pass_the_gradient_on_but_get_none(classifier: tuple[Path, Program]) -> None:
    folder, made = classifier
    artifact = open_artifact(folder, verify=False)
    data, adapter = arrays(made.make_batch(2, 9)), artifact.adapter()
    with open_engine(artifact) as stack:
        everything = stack.step(data, full(4), adapter).grads
        some = stack.step(data, (Mode.FORWARD, Mode.TRAIN, Mode.FORWARD, Mode.TRAIN), adapter).grads
        none = stack.step(data, (Mode.FORWARD,) * 4, adapter).grads
    assert sorted({n.split(".")[1] for n in some if n.startswith("blocks")}) == ["1", "3"]
    assert all(np.array_equal(some[n], everything[n]) for n in some)
    assert none.keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("learning", "head"), [pytest.param((0, 2), False, marks=pytest.mark.slow), ((), True)]
)
def test_a_layer_without_anything_to_train_is_run_and_trains_nothing(
    tmp_path: Path, learning: tuple[int, ...], head: bool
) -> None:
    """The plans leave the first, the last, both and neither of those that learn."""
    torch.manual_seed(0)
    module = Classifier((0.25, 0.25, 0.25))
    module.head.requires_grad_(head)
    for i, block in enumerate(module.blocks):
        block.down.requires_grad_(i in learning)
        block.up.requires_grad_(i in learning)
    made = export(module, tmp_path / "artifact")
    assert selfcheck(tmp_path / "artifact").ok
    artifact, data = open_artifact(tmp_path / "artifact"), made.make_batch(4, 9)
    assert artifact.manifest.learning == set(learning)
    anatomy = find_anatomy(made, batch=3, seq=7)
    for memory in (SAVE_ALL, RECOMPUTE, MemoryPlan(micro_batch=1, streamed=True)):
        with open_engine(artifact, memory=memory, threads=1) as stack:
            for plan in itertools.product((Mode.DROP, Mode.FORWARD, Mode.TRAIN), repeat=3):
                dropped = [i for i, mode in enumerate(plan) if mode is Mode.DROP]
                expected = torch_step(made, anatomy, data, dropped=dropped)
                result = stack.step(arrays(data), plan, artifact.adapter())
                assert relative_error(np.float32(result.loss), expected["loss"].numpy()) < 1e-5
                trained = {f"blocks.{i}." for i in learning if plan[i] is Mode.TRAIN}
                trained |= {"head.weight", "head.bias"} if head else set()
                assert {n for n in artifact.adapter() if n.startswith(tuple(trained))} == result.grads.keys()
                for name, grad in result.grads.items():
                    assert relative_error(grad, expected[f"grad.{name}"].numpy()) < 2e-5, (plan, name)


def test_a_dropped_layer_is_not_read(
    classifier: tuple[Path, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = classifier
    artifact = open_artifact(folder, verify=False)
    read: set[int] = set()
    real = type(artifact).base
    monkeypatch.setattr(type(artifact), "base", lambda self, row: (read.add(row.layer), real(self, row))[1])
    with open_engine(artifact) as stack:
        stack.step(arrays(made.make_batch(2, 9)), dropping(4, (0, 2)), artifact.adapter())
    assert read == {-1, 1, 3}


def test_a_forward_that_cannot_be_traced_names_its_line(tmp_path: Path) -> None:
    class Branching(Block):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return x * 2 if bool(x.sum() > 0) else super().forward(x, bias)

    module = Classifier((1.0, 1.0))
    module.blocks = nn.ModuleList([Branching(1.0), Branching(1.0)])
    with pytest.raises(
        ExportError, match=r"blocks\.0: tracing stopped at .*test_plain_module\.py:\d+ .*x\.sum"
    ):
        export(module, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_features_are_found_with_more_classes_than_they_are_wide(tmp_path: Path) -> None:
    """16 wide: one identity of 21 rows does; with 5 classes it takes four."""
    torch.manual_seed(0)
    module = Classifier((0.25,))
    module.head = nn.Linear(16, 21, bias=False)
    made = program(module)
    names = tuple(f"class {i}" for i in range(21))
    write_artifact(
        made, Description("wide", "Classifier", "sequence-classification", names, {}), tmp_path / "a"
    )
    batch = made.make_batch(3, 7)
    features: list[Tensor] = []
    module.head.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    module(batch["input_ids"], batch["attention_mask"])
    with open_engine(open_artifact(tmp_path / "a")) as engine:
        found = engine.features(arrays(batch), engine.artifact.adapter())
    np.testing.assert_allclose(found, features[0].numpy(), atol=1e-5)
