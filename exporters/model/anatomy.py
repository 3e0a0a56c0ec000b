"""Finds prelude, blocks and head of any module that runs a ``ModuleList`` of blocks one after the other.

Nothing here knows a model by name: one forward pass under hooks shows which blocks are called, what flows through them
(the hidden stream) and what they are given beside it (the sides: masks, rotary tables).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.program import Program


@dataclass(frozen=True)
class Call:
    """One call of a block: its flattened arguments, where the hidden stream enters, and which leaves are sides."""

    module: nn.Module
    path: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    output: Any
    hidden: int = 0

    @property
    def sides(self) -> tuple[int, ...]:
        """Leaves that are tensors other than the hidden stream."""
        return tuple(i for i, leaf in enumerate(self.leaves) if i != self.hidden and isinstance(leaf, Tensor))

    def arguments(self, hidden: Tensor, sides: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with other tensors in the places of the recorded ones."""
        leaves = list(self.leaves)
        leaves[self.hidden] = hidden
        for place, side in zip(self.sides, sides, strict=True):
            leaves[place] = side
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def wrap(self, hidden: Tensor) -> Any:
        """``hidden`` in the form in which the block returned its own (a tensor, or first of a tuple)."""
        return (hidden, *self.output[1:]) if isinstance(self.output, tuple) else hidden


@dataclass(frozen=True)
class Anatomy:
    """The calls of the blocks in order, and the path of the list that holds them."""

    calls: tuple[Call, ...]
    path: str

    @property
    def sides(self) -> list[tuple[int, int]]:
        """The distinct side tensors, each as (layer, leaf) of its first use."""
        return list(
            {
                id(c.leaves[s]): (i, s) for i, c in reversed(list(enumerate(self.calls))) for s in c.sides
            }.values()
        )[::-1]

    def side_indices(self, layer: int) -> tuple[int, ...]:
        """For each side slot of ``layer``, the index of its tensor in :attr:`sides`."""
        order = {id(self.calls[i].leaves[s]): n for n, (i, s) in enumerate(self.sides)}
        call = self.calls[layer]
        return tuple(order[id(call.leaves[s])] for s in call.sides)


def stream(output: Any) -> Tensor:
    """The hidden stream in what a block returned."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def find_anatomy(program: Program, *, batch: int, seq: int) -> Anatomy:
    """Run the module once and find its blocks.

    Raises:
        ExportError: no list of blocks that are called one after the other, each on what the one before returned.
    """
    calls = _record(program, batch=batch, seq=seq)
    candidates = [a for path, seen in calls.items() if (a := _chain(path, seen))]
    if not candidates:
        raise ExportError(_no_blocks(program.module, calls))
    return max(
        candidates,
        key=lambda a: sum(
            p.numel() for c in {id(c.module): c for c in a.calls}.values() for p in c.module.parameters()
        ),
    )


StandIn = Callable[[list[Any]], Tensor]


@contextmanager
def replaced(anatomy: Anatomy, stand_ins: Sequence[StandIn | None]) -> Iterator[None]:
    """For the duration, each call of a block goes to its stand-in ``f(leaves) -> hidden``, or with None to the block itself.

    Calls are told apart by their order, so that a block which several layers share may be replaced in some of them.
    """
    queue = iter(zip(anatomy.calls, stand_ins, strict=True))

    def forward_of(module: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, stand_in = next(queue)
            if stand_in is None:
                return type(module).forward(module, *args, **kwargs)
            leaves, _ = pytree.tree_flatten((args, kwargs))
            return call.wrap(stand_in(leaves))

        return forward

    modules = {id(c.module): c.module for c in anatomy.calls}.values()
    for module in modules:
        module.forward = forward_of(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _record(program: Program, *, batch: int, seq: int) -> dict[str, list[Call]]:
    seen: dict[str, list[Call]] = {}
    hooks = []
    for path, parent in program.module.named_modules():
        if isinstance(parent, nn.ModuleList):
            for name, child in parent.named_children():
                hooks.append(
                    child.register_forward_hook(_hook(seen, path, f"{path}.{name}"), with_kwargs=True)
                )
    try:
        with torch.no_grad():
            program.logits(program.make_batch(batch, seq))
    except Exception as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise ExportError(
            f"{type(program.module).__name__}: its forward fails on an example batch: {reason}"
        ) from exc
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _hook(seen: dict[str, list[Call]], list_path: str, path: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        seen.setdefault(list_path, []).append(Call(module, path, tuple(leaves), spec, output))

    return hook


def _chain(path: str, calls: list[Call]) -> Anatomy | None:
    first = _hidden_leaf(calls)
    if first is None or not all(isinstance(stream(c.output), Tensor) for c in calls):
        return None
    placed = [Call(c.module, c.path, c.leaves, c.spec, c.output, first) for c in calls]
    for before, after in itertools.pairwise(placed):
        if first >= len(after.leaves) or after.leaves[first] is not stream(before.output):
            return None
    shape = stream(placed[-1].output).shape
    return Anatomy(tuple(placed), path) if placed[0].leaves[first].shape == shape else None


def _hidden_leaf(calls: list[Call]) -> int | None:
    if len(calls) > 1:
        given = stream(calls[0].output)
        return next((i for i, leaf in enumerate(calls[1].leaves) if leaf is given), None)
    floats = (
        i for i, leaf in enumerate(calls[0].leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    return next(floats, None)


def _no_blocks(module: nn.Module, calls: dict[str, list[Call]]) -> str:
    what = f"{type(module).__name__}: no list of blocks"
    if not calls:
        return f"{what}: it calls the members of no nn.ModuleList, so there is no layer to drop"
    tried = ", ".join(f"{path} ({len(seen)} calls)" for path, seen in calls.items())
    return f"{what}: in none of {tried} does each member take what the one before returned, in the same shape"
