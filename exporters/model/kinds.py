"""Blocks that compute the same function of their weights and inputs share one kind, and therefore one set of graphs."""

import torch
from torch import Tensor
from torch.func import functional_call

from fleetune.exporters.model.anatomy import Anatomy, Call, stream
from fleetune.exporters.model.program import tensors_of, trainable_names

Signature = tuple[object, ...]


def group_kinds(anatomy: Anatomy) -> tuple[list[Call], list[int]]:
    """One representative call per kind, and the kind of each layer.

    Two blocks are of one kind if their tensors and arguments have the same form and the representative, given the other's
    weights and inputs, returns the other's output: attributes that change behaviour (a window, a scale) are noticed by that.
    """
    kinds: list[Call] = []
    of_layer: list[int] = []
    for call in anatomy.calls:
        found = next((i for i, kind in enumerate(kinds) if _same_kind(kind, call)), None)
        if found is None:
            kinds.append(call)
        of_layer.append(len(kinds) - 1 if found is None else found)
    return kinds, of_layer


def _same_kind(kind: Call, call: Call) -> bool:
    if _signature(kind) != _signature(call):
        return False
    args, kwargs = call.arguments(call.leaves[call.hidden], tuple(call.leaves[s] for s in call.sides))
    with torch.no_grad():
        output = stream(functional_call(kind.module, tensors_of(call.module), args, kwargs))
    return torch.equal(output, stream(call.output))


def _signature(call: Call) -> Signature:
    tensors = tuple((n, t.shape, t.dtype) for n, t in tensors_of(call.module).items())
    leaves = tuple(_form(leaf) for leaf in call.leaves)
    return type(call.module), tensors, tuple(trainable_names(call.module)), leaves, call.spec


def _form(leaf: object) -> object:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
