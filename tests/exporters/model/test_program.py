"""What an exporter is given: tensors by name, and sizes that tell batch and sequence from every other dimension."""

import dataclasses

import pytest
import torch
from plain_models import WIDTH, Classifier, program
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fleetune.device_runtime.contracts.manifest import Targets
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.program import Program, check_mean, tensors_of, traced_sizes, trainable_names


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


LOGITS = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1, 2, 3, 0, 1, 2], [3, 2, -100, -100, -100, -100], [-100] * 6])
LABELLED, NEXT = Targets(shift=0, ignored=-100), Targets(shift=1, ignored=-100)


def over_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def over_next(logits: Tensor, labels: Tensor) -> Tensor:
    return over_labels(logits[:, :-1], labels[:, 1:])


def over_rows(logits: Tensor, labels: Tensor) -> Tensor:
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    return losses.mean()


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return over_labels(logits, labels) * (labels != -100).sum()


def losing(loss: object, counted: Targets | None) -> Program:
    return dataclasses.replace(program(Classifier((1.0,))), loss=loss, counted=counted)


@pytest.mark.parametrize(
    ("loss", "counted"),
    [(over_labels, LABELLED), (over_next, NEXT), (over_rows, None)],
    ids=["labels", "next", "rows"],
)
def test_a_loss_that_is_the_mean_it_says_passes(loss: object, counted: Targets | None) -> None:
    check_mean(losing(loss, counted), LOGITS, LABELS)


@pytest.mark.parametrize(
    ("loss", "counted", "over"),
    [
        (over_labels, None, "rows"),
        (over_next, LABELLED, "labels other than -100"),
        (summed, LABELLED, "labels"),
    ],
)
def test_a_loss_that_is_another_is_refused(loss: object, counted: Targets | None, over: str) -> None:
    with pytest.raises(ExportError, match=rf"loss: .* as the mean of its rows over {over}"):
        check_mean(losing(loss, counted), LOGITS[:2], LABELS[:2])
