"""What an exporter is given: a plain module, how to read its output, and one example batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fleetune.device_runtime.contracts.manifest import Input, Targets
from fleetune.device_runtime.errors import ExportError

_TRACED_SEQ = (37, 41, 43, 47, 53, 59, 29, 31, 23, 19, 17, 13, 11, 7, 15, 14, 10, 9, 6, 5)
"""Lengths to trace at, best first; the shorter ones are for models of few positions."""


@dataclass(frozen=True)
class TokenLoss:
    """A loss that is a mean over tokens: ``sum`` takes (logits, targets) of any tokens to the sum of their losses."""

    sum: Callable[[Tensor, Tensor], Tensor]
    targets: Targets


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
        token_loss: the same loss token by token, if it is one; a head that works token by token is then run in chunks.
        longest: the most tokens that the module has positions for; None where it has no table of them.
    """

    module: nn.Module
    read_logits: Callable[[Any], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    make_batch: Callable[[int, int], dict[str, Tensor]]
    inputs: tuple[Input, ...]
    names: dict[str, str]
    shapes: frozenset[int] = field(default_factory=frozenset)
    token_loss: TokenLoss | None = None
    longest: int | None = None

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of a batch; its labels, if any, are not looked at."""
        return self.read_logits(self.module(**{k: v for k, v in batch.items() if k != self.label_name}))

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


def traced_sizes(program: Program) -> tuple[int, int]:
    """A batch and a sequence size that coincide with no dimension of the model, so that symbols stay apart.

    Raises:
        ExportError: the model has positions for too few tokens.
    """
    taken = set(program.shapes)
    for tensor in tensors_of(program.module).values():
        taken.update(tensor.shape)
    batch = next(n for n in (3, 5, 7, 11, 13, 17, 19) if n not in taken)
    longest = max(_TRACED_SEQ) if program.longest is None else program.longest
    fitting = (n for n in _TRACED_SEQ if n <= longest and n not in taken and n != batch)
    if (seq := next(fitting, None)) is None:
        raise ExportError(f"positions for {longest} tokens are too few to trace a model of these sizes")
    return batch, seq
