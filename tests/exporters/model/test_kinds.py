"""Blocks share a kind if one computes the other's output from the other's weights; anything that shows parts them."""

import copy
from collections.abc import Callable

import pytest
import torch
from plain_models import Block, Classifier, program
from torch import nn

from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.kinds import group_kinds


def kinds_of(module: nn.Module) -> list[int]:
    kinds, of_layer = group_kinds(find_anatomy(program(module), batch=3, seq=7))
    assert len(kinds) == max(of_layer) + 1
    return of_layer


def test_an_attribute_that_no_parameter_shows_makes_a_kind() -> None:
    assert kinds_of(Classifier((1.0, 2.0, 1.0, 2.0))) == [0, 1, 0, 1]


def test_other_weights_are_the_same_kind() -> None:
    module = Classifier((1.0, 1.0))
    assert not torch.equal(module.blocks[0].qkv.weight, module.blocks[1].qkv.weight)
    assert kinds_of(module) == [0, 0]


def freeze(block: Block) -> None:
    block.down.requires_grad_(False)


def widen(block: Block) -> None:
    block.down, block.up = nn.Linear(16, 6, bias=False), nn.Linear(6, 16, bias=False)


@pytest.mark.parametrize("change", [freeze, widen])
def test_what_learns_and_what_shape_it_has_make_kinds(change: Callable[[Block], None]) -> None:
    module = Classifier((1.0, 1.0, 1.0))
    change(module.blocks[1])
    assert kinds_of(module) == [0, 1, 0]


def test_a_class_of_its_own_is_a_kind_though_it_computes_the_same() -> None:
    class Other(Block):
        pass

    module = Classifier((1.0, 1.0))
    other = Other(1.0)
    other.load_state_dict(copy.deepcopy(module.blocks[1].state_dict()))
    for mine, theirs in zip(other.parameters(), module.blocks[1].parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    module.blocks[1] = other
    assert kinds_of(module) == [0, 1]
