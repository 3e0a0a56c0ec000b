"""The recorded step is torch's own, of an adapter with noise; the program is left as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_models import Classifier, program
from safetensors import safe_open
from safetensors.torch import load_file

from fleetune.device_runtime.contracts.artifact import NOISE_STEP
from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.golden import (
    NOISE,
    chained_plans,
    record_golden,
    single_plans,
    torch_step,
    without,
)


def test_plans_say_what_is_dropped() -> None:
    assert chained_plans(5) == {"full": [], "dropped": [1, 3]}
    assert single_plans(3) == {"layer0": [1, 2], "layer1": [0, 2], "layer2": [0, 1]}


@pytest.mark.parametrize("dropped", [(), (1,), (0, 1, 2)])
def test_a_step_without_layers_equals_the_module_without_them(dropped: tuple[int, ...]) -> None:
    module = Classifier((1.0, 2.0, 1.0))
    made = program(module)
    batch = made.make_batch(2, 5)
    found = torch_step(made, find_anatomy(made, batch=3, seq=7), batch, dropped=dropped)
    module.blocks = torch.nn.ModuleList([b for i, b in enumerate(module.blocks) if i not in dropped])
    logits = made.logits(batch)
    loss = made.loss(logits, batch["labels"])
    (gradient,) = torch.autograd.grad(loss, module.head.weight)
    assert torch.equal(found["logits"], logits)
    assert torch.equal(found["loss"], loss)
    torch.testing.assert_close(found["grad.head.weight"], gradient)
    named = {name.split(".")[2] for name in found if name.startswith("grad.blocks")}
    assert named == {str(i) for i in range(3) if i not in dropped}


def test_what_is_recorded_is_the_step_of_the_adapter_with_its_noise(tmp_path: Path) -> None:
    module = Classifier((1.0, 1.0))
    made, path = program(module), tmp_path / "golden"
    anatomy = find_anatomy(made, batch=3, seq=7)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    record_golden(made, anatomy, path)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    found = load_file(path)
    noise = {n.removeprefix("noise."): v for n, v in found.items() if n.startswith("noise.")}
    assert noise.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert all(v.dtype == torch.int8 and v.abs().max() <= NOISE for v in noise.values())
    with torch.no_grad():
        for name, units in noise.items():
            module.get_parameter(name).add_(units * NOISE_STEP)
    batch = {n.removeprefix("batch."): v for n, v in found.items() if n.startswith("batch.")}
    step = torch_step(made, anatomy, batch, dropped=[1])
    assert {n for n in found if n.startswith("dropped.")} == {f"dropped.{n}" for n in step}
    for name, value in step.items():
        torch.testing.assert_close(found[f"dropped.{name}"], value)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["plans"]) == {"full": [], "dropped": [1]}


def test_two_recordings_are_equal_to_the_byte(tmp_path: Path) -> None:
    made = program(Classifier((1.0, 1.0)))
    anatomy = find_anatomy(made, batch=3, seq=7)
    for name in ("first", "second"):
        record_golden(made, anatomy, tmp_path / name, plans_of=single_plans)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_outside_of_without_all_layers_run() -> None:
    made = program(Classifier((1.0, 1.0)))
    anatomy, batch = find_anatomy(made, batch=3, seq=7), made.make_batch(2, 5)
    whole = made.logits(batch)
    with without(anatomy, [0]):
        assert not torch.equal(made.logits(batch), whole)
    assert torch.equal(made.logits(batch), whole)


@pytest.mark.parametrize(("vocabulary", "tokens"), [(0, 24), (50_000, 24), (151_936, 13), (10**6, 8)])
def test_of_a_large_vocabulary_fewer_tokens_are_recorded(
    tmp_path: Path, vocabulary: int, tokens: int
) -> None:
    made = program(Classifier((1.0, 1.0)))
    asked: list[int] = []
    batches = replace(made, make_batch=lambda batch, seq: asked.append(seq) or made.make_batch(batch, seq))
    anatomy = find_anatomy(made, batch=3, seq=7)
    record_golden(batches, anatomy, tmp_path / "golden", vocabulary=vocabulary)
    assert asked == [tokens]
