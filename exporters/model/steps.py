"""The same model on new tokens alone, with keys and values of the tokens before: prelude and blocks for generating text.

Nothing here knows how a model remembers: the program's ``stepping`` makes of a :class:`Past` what the module takes, and the
module asks that for the keys and values of all tokens, block by block.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from fleetune.device_runtime.contracts.manifest import Role
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.anatomy import Anatomy, Call, find_anatomy, stream
from fleetune.exporters.model.program import Program, Stepping, tensors_of, traced_step, trainable_names
from fleetune.exporters.model.sections import Argument, SectionFunction, prelude

Pair = tuple[Tensor, Tensor]
"""Keys and values of one block, (batch, heads, tokens, width) each."""
_AGREES = 1e-4
"""Of the largest logit: how far a model may be from itself when it is run in two parts."""


class Past:
    """Keys and values of the tokens before; each block that runs takes the next pair, and leaves its own of all tokens."""

    def __init__(self) -> None:
        self.length: int = 0
        self.made: list[Pair] = []
        self._given: list[Pair] = []

    def start(self, length: int, given: Sequence[Pair] = ()) -> None:
        """Begin a run after ``length`` tokens; ``given`` are those of the blocks that will run, in their order."""
        self.length, self._given, self.made = length, list(given), []

    def extend(self, key: Tensor, value: Tensor) -> Pair:
        """Put the new tokens' keys and values of the block at work after those given for it."""
        if self._given:
            before, seen = self._given.pop(0)
            key, value = torch.cat([before, key], dim=-2), torch.cat([seen, value], dim=-2)
        self.made.append((key, value))
        return key, value


class Steps(NamedTuple):
    """How a program runs on new tokens: itself with a memory, its blocks as they were called then, the sizes of the example."""

    program: Program
    past: Past
    anatomy: Anatomy
    sizes: tuple[int, int, int, int]
    pairs: tuple[Pair, ...]


def find_steps(program: Program, anatomy: Anatomy, *, sizes: tuple[int, int]) -> Steps | None:
    """Run the program in two parts, as text is generated; None for one that has no ``stepping`` or too few positions.

    Raises:
        ExportError: what it says then is not what it says at once, or its blocks are called otherwise.
    """
    extents = traced_step(program, sizes)
    if program.stepping is None or extents is None:
        return None
    batch, seq, before, total = extents
    past, whole = Past(), program.make_batch(batch, total)
    stepping = with_past(program, past)
    pairs = read_first(stepping, past, whole, before)
    # Copies: of a view the tracer asks for what it is a view of.
    late = {name: t.clone() for name, t in part_of(program, whole, slice(before, total)).items()}

    def begun(_: int, __: int) -> dict[str, Tensor]:
        past.start(before, pairs)
        return late

    found = find_anatomy(replace(stepping, make_batch=begun), batch=batch, seq=seq)
    example = replace(stepping, make_batch=lambda _, __: late)
    steps = Steps(example, past, found, extents, tuple(pairs))
    _check_calls(anatomy, found, pairs)
    _check_logits(program, steps, whole)
    return steps


def with_past(program: Program, past: Past) -> Program:
    """The program called with a memory beside every batch."""
    stepping = _stepping(program)

    def beside(batch: dict[str, Tensor]) -> dict[str, object]:
        past.length = batch[stepping.whole[0]].shape[1] - batch[stepping.ids].shape[1]
        return stepping.beside(past)

    return replace(program, beside=beside)


def read_first(stepping: Program, past: Past, batch: dict[str, Tensor], count: int) -> list[Pair]:
    """Run the first ``count`` tokens of ``batch`` and return what the blocks that ran remember of them."""
    past.start(0)
    with torch.no_grad():
        stepping.logits(part_of(stepping, batch, slice(0, count)))
    return past.made


def part_of(program: Program, batch: dict[str, Tensor], tokens: slice) -> dict[str, Tensor]:
    """Some tokens of a batch; what speaks of the tokens before them too, (batch, past + seq), ends with them."""
    stepping = _stepping(program)
    sequences = {row.name for row in program.inputs if "seq" in row.shape}
    return {
        name: array[:, : tokens.stop]
        if name in stepping.whole
        else array[:, tokens]
        if name in sequences
        else array
        for name, array in batch.items()
    }


def prelude_step(steps: Steps) -> SectionFunction:
    """New tokens -> the first block's input, and every distinct side tensor."""
    batch, seq, *_ = steps.sizes
    return replace(prelude(steps.program, steps.anatomy, sizes=(batch, seq)), what="prelude (step)")


def block_step(steps: Steps, layer: int) -> SectionFunction:
    """Input, sides, keys and values of the tokens before -> output, and keys and values of all tokens."""
    call, (key, value) = steps.anatomy.calls[layer], steps.pairs[layer]
    tensors = tensors_of(call.module)
    arguments = [
        Argument("hidden", 0, call.leaves[call.hidden].detach()),
        *(Argument("side", i, call.leaves[s].detach()) for i, s in enumerate(call.sides)),
        Argument("saved", 0, key.detach()),
        Argument("saved", 1, value.detach()),
        *(Argument("weight", i, t.detach(), name) for i, (name, t) in enumerate(tensors.items())),
    ]
    num_sides = len(call.sides)

    def function(x: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        sides, pair, weights = rest[:num_sides], rest[num_sides : num_sides + 2], rest[num_sides + 2 :]
        steps.past.start(pair[0].shape[-2], [(pair[0], pair[1])])
        with torch.no_grad():
            args, kwargs = call.arguments(x, sides)
            y = stream(functional_call(call.module, dict(zip(tensors, weights, strict=True)), args, kwargs))
        return y, *steps.past.made[0]

    results: tuple[tuple[Role, int], ...] = (("hidden", 0), ("saved", 0), ("saved", 1))
    prefix = f"{call.path}."
    return SectionFunction(
        f"{call.path} (step)",
        function,
        tuple(arguments),
        results,
        tuple(f"{prefix}{n}" for n in tensors),
        trained=frozenset(f"{prefix}{n}" for n in trainable_names(call.module)),
    )


def _stepping(program: Program) -> Stepping:
    if program.stepping is None:
        raise ExportError(f"{type(program.module).__name__}: nothing says how it runs on new tokens alone")
    return program.stepping


def _check_calls(anatomy: Anatomy, found: Anatomy, pairs: Sequence[Pair]) -> None:
    """Refuse blocks that take other sides than without a memory, or that do not remember one pair each."""
    layers = range(len(anatomy.calls))
    if [c.path for c in found.calls] != [c.path for c in anatomy.calls] or len(pairs) != len(layers):
        raise ExportError(f"{anatomy.path}: {len(pairs)} of {len(layers)} blocks remember keys and values")
    if any(_form(found, i) != _form(anatomy, i) for i in layers):
        raise ExportError(f"{anatomy.path}: its blocks are called otherwise on new tokens alone")


def _form(anatomy: Anatomy, layer: int) -> tuple[object, ...]:
    call: Call = anatomy.calls[layer]
    return anatomy.side_indices(layer), *(call.leaves[s].ndim for s in call.sides)


def _check_logits(program: Program, steps: Steps, whole: dict[str, Tensor]) -> None:
    before = steps.sizes[2]
    with torch.no_grad():
        expected = program.logits(whole)[:, before:]
        pairs = read_first(steps.program, steps.past, whole, before)
        steps.past.start(before, pairs)
        found = steps.program.logits(steps.program.make_batch(0, 0))
    if found.shape != expected.shape or (found - expected).abs().max() > _AGREES * expected.abs().max():
        raise ExportError(
            f"{type(program.module).__name__}: in two parts it says something else than at once"
        )
