"""What an exporter is given: tensors by name, and sizes that tell batch and sequence from every other dimension."""

import dataclasses

import pytest
import torch
from plain_models import WIDTH, Classifier, program
from torch import nn

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.program import tensors_of, traced_sizes, trainable_names


def test_traced_sizes_are_no_dimension_of_the_model() -> None:
    made = program(Classifier((1.0,)))
    assert traced_sizes(made) == (3, 37)
    taken = dataclasses.replace(made, shapes=frozenset({3, 5, 37}))
    assert traced_sizes(taken) == (7, 41)
    made.module.wide = nn.Parameter(torch.zeros(3, 37))
    assert traced_sizes(made) == (7, 41)  # 5 is the number of classes


@pytest.mark.parametrize(("longest", "seq"), [(37, 37), (36, 29), (20, 19), (16, 13), (8, 7), (6, 6)])
def test_a_model_of_few_positions_is_traced_within_them(longest: int, seq: int) -> None:
    made = dataclasses.replace(program(Classifier((1.0,))), longest=longest)
    assert traced_sizes(made) == (3, seq)


def test_too_few_positions_to_tell_sizes_apart_are_refused() -> None:
    made = dataclasses.replace(program(Classifier((1.0,))), longest=5)  # 5 is the number of classes
    with pytest.raises(ExportError, match="positions for 5 tokens are too few"):
        traced_sizes(made)


def test_a_tied_tensor_has_one_name_and_buffers_count() -> None:
    module = nn.Module()
    module.first = nn.Linear(2, 2, bias=False)
    module.second = nn.Linear(2, 2, bias=False)
    module.second.weight = module.first.weight
    module.register_buffer("table", torch.zeros(3))
    assert list(tensors_of(module)) == ["first.weight", "table"]
    assert trainable_names(module) == ["first.weight"]


def test_logits_do_not_see_the_labels() -> None:
    made = program(Classifier((1.0,)))
    batch = made.make_batch(2, 5)
    assert made.logits(batch).shape == (2, 5)
    other = {**batch, "labels": batch["labels"] + 1}
    assert torch.equal(made.logits(batch), made.logits(other))
    assert made.module.embed.weight.shape[1] == WIDTH
