"""What an exporter is given: a plain module, how to read its output, and one example batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fleetune.device_runtime.contracts.manifest import Input, Targets
from fleetune.device_runtime.errors import ExportError

_TRACED_SEQ = (37, 41, 43, 47, 53, 59, 29, 31, 23, 19, 17, 13, 11, 7, 15, 14, 10, 9, 6, 5)
"""Lengths to trace at, best first; the shorter ones are for models of few positions."""


class Remembers(Protocol):
    """Holds keys and values of the tokens before those that a module is called on."""

    @property
    def length(self) -> int:
        """How many tokens it holds."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the block at work, all tokens (batch, heads, past + seq, width), of those of its new ones."""


class Stepping(NamedTuple):
    """How a module runs on new tokens alone.

    ``beside`` makes of a memory what the module takes beside a batch; ``whole`` names the inputs that speak of the tokens
    before too, (batch, past + seq), the first of which says how many there are.
    """

    beside: Callable[[Remembers], dict[str, Any]]
    whole: tuple[str, ...]
    ids: str = "input_ids"


@dataclass(frozen=True)
class Program:
    """A model to be trained on devices.

    Attributes:
        module: called with the batch's arrays (labels left out) by keyword; in evaluation mode, no dropout.
        read_logits: what the module returned -> logits, float32.
        loss: (logits, labels) -> mean loss, a scalar.
        make_batch: (batch, seq) -> example arrays by input name, labels included, with some padding if there is any.
        inputs: one row per array of a batch, in manifest terms; the role of one of them is ``labels``.
        names: parameter or buffer name in ``module`` -> tensor name in the artifact.
        shapes: dimensions that no traced size may equal, beside those of the parameters.
        counted: which labels ``loss`` is a mean over; None for one over rows.
        token_loss: (logits, targets) of any tokens -> the sum of their losses, if ``loss`` is the mean of that over ``counted``;
            a head that works token by token is then run in chunks.
        longest: the most tokens that the module has positions for; None where it has no table of them.
        stepping: how it runs on new tokens alone; None for a module that cannot.
        beside: batch -> what the module is called with beside the batch's arrays.
    """

    module: nn.Module
    read_logits: Callable[[Any], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    make_batch: Callable[[int, int], dict[str, Tensor]]
    inputs: tuple[Input, ...]
    names: dict[str, str]
    shapes: frozenset[int] = field(default_factory=frozenset)
    counted: Targets | None = None
    token_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    longest: int | None = None
    stepping: Stepping | None = None
    beside: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda _: {}

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of a batch; its labels, if any, are not looked at."""
        given = {k: v for k, v in batch.items() if k != self.label_name}
        return self.read_logits(self.module(**given, **self.beside(given)))

    @property
    def label_name(self) -> str:
        """The input that holds the labels; ExportError unless there is exactly one."""
        found = [row.name for row in self.inputs if row.role == "labels"]
        if len(found) != 1:
            raise ExportError(f"inputs: expected one whose role is labels, got {len(found)}")
        return found[0]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied tensor appears once, under its first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def trainable_names(module: nn.Module) -> list[str]:
    """Names of the parameters that learn, in registration order."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def check_mean(program: Program, logits: Tensor, labels: Tensor) -> None:
    """Refuse a loss that is not the mean its program says, row by row: devices take it over parts and put these together.

    Args:
        program: whose ``loss`` and ``counted`` are compared.
        logits: (batch, …, classes).
        labels: as in a batch, of two rows or more.

    Raises:
        ExportError: names both numbers.
    """
    with torch.no_grad():
        whole = float(program.loss(logits, labels))
        parts = [
            (_share(labels[i : i + 1], program.counted), program.loss(logits[i : i + 1], labels[i : i + 1]))
            for i in range(len(labels))
        ]
    mean = sum(share * float(loss) for share, loss in parts if share) / max(1, sum(s for s, _ in parts))
    if not math.isclose(whole, mean, rel_tol=1e-4, abs_tol=1e-6):
        over = "rows" if program.counted is None else f"labels other than {program.counted.ignored}"
        raise ExportError(
            f"loss: {whole:.6g} of a batch, {mean:.6g} as the mean of its rows over {over}; "
            "devices split batches, so a loss must be a plain mean: say over what in Program.counted"
        )


def _share(labels: Tensor, counted: Targets | None) -> int:
    if counted is None:
        return len(labels)
    return int((labels[..., counted.shift :] != counted.ignored).sum())


def traced_sizes(program: Program) -> tuple[int, int]:
    """A batch and a sequence size that coincide with no dimension of the model, so that symbols stay apart.

    Raises:
        ExportError: the model has positions for too few tokens.
    """
    taken = _taken(program)
    batch = next(n for n in (3, 5, 7, 11, 13, 17, 19) if n not in taken)
    longest = max(_TRACED_SEQ) if program.longest is None else program.longest
    fitting = (n for n in _TRACED_SEQ if n <= longest and n not in taken and n != batch)
    if (seq := next(fitting, None)) is None:
        raise ExportError(f"positions for {longest} tokens are too few to trace a model of these sizes")
    return batch, seq


def traced_step(program: Program, sizes: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Batch, new tokens, tokens before and all tokens to trace steps at, after ``sizes``; None if there is no room for them."""
    batch, seq = sizes
    longest = 2 * max(_TRACED_SEQ) if program.longest is None else program.longest
    taken = _taken(program) | {batch, seq}
    fitting = (
        n for n in sorted(_TRACED_SEQ) if n not in taken and n + seq not in taken and n + seq <= longest
    )
    past = next(fitting, None)
    return None if past is None else (batch, seq, past, past + seq)


def _taken(program: Program) -> set[int]:
    """Extents that would be taken for a dimension of the model."""
    return set(program.shapes).union(*(tensor.shape for tensor in tensors_of(program.module).values()))
