"""Records what torch computes, so that any device can replay it: a step per layer plan, with what it learns."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts.artifact import NOISE_STEP
from fleetune.exporters.model.anatomy import Anatomy, Call, StandIn, replaced
from fleetune.exporters.model.program import Program, trainable_names
from fleetune.exporters.model.steps import Pair, Steps, part_of

NOISE = 71
"""Largest noise, in units of NOISE_STEP, added to the adapter before recording: a fresh LoRA's zeros would make half of the
gradients zero. Its spread is 0.02."""

_BATCH, _FEWEST_TOKENS, _MOST_TOKENS = 2, 8, 24
_LOGITS_BYTES = 2**24
"""Of a recorded plan, where a vocabulary has so many words that they would be most of the artifact."""
_ALL_LOGITS_BYTES = 2 * _LOGITS_BYTES
"""Of all plans together; those that come later have loss and gradients, which the head is in too."""
_LEAST_WITH_LOGITS = 2
"""Plans whose logits are recorded however large they are."""


def chained_plans(num_layers: int) -> dict[str, list[int]]:
    """The layers that each recorded plan drops: none, and every second one."""
    return {"full": [], "dropped": list(range(1, num_layers, 2))}


def single_plans(num_layers: int) -> dict[str, list[int]]:
    """One plan for each layer, which runs it alone."""
    return {f"layer{i}": [j for j in range(num_layers) if j != i] for i in range(num_layers)}


def record_golden(
    program: Program,
    anatomy: Anatomy,
    path: Path,
    *,
    plans_of: Callable[[int], dict[str, list[int]]] = chained_plans,
    steps: Steps | None = None,
    vocabulary: int = 0,
) -> None:
    """Write ``noise.*`` (of the adapter), ``batch.*`` and per plan ``loss``, ``logits``, ``grad.*``; metadata names the plans.

    Where many plans have large logits, only the first ones' are written, with ``steps.PLAN``.

    With ``steps`` also ``steps.ends``, where each of the parts ends in which the batch is read, and per plan ``steps.PLAN``: the
    logits (parts, batch, classes) of their last tokens.

    Args:
        program: what computes.
        anatomy: its layers.
        path: file to write.
        plans_of: which layers each recorded plan drops.
        steps: how the program runs on new tokens.
        vocabulary: classes of each token's logits, if each token has some: of a large one fewer tokens are recorded.
    """
    torch.manual_seed(0)
    arrays = program.make_batch(_BATCH, _num_tokens(vocabulary, longest=program.longest))
    plans = plans_of(len(anatomy.calls))
    tensors: dict[str, Tensor] = {f"batch.{name}": value for name, value in arrays.items()}
    with _perturbed(program) as noise:
        tensors |= {f"noise.{name}": value for name, value in noise.items()}
        logits_bytes = 0
        for i, (plan, dropped) in enumerate(plans.items()):
            found = torch_step(program, anatomy, arrays, dropped=dropped)
            logits_bytes += found["logits"].nbytes
            has_logits = i < _LEAST_WITH_LOGITS or logits_bytes <= _ALL_LOGITS_BYTES
            tensors |= {f"{plan}.{n}": value for n, value in found.items() if has_logits or n != "logits"}
            if steps is not None and has_logits:
                tensors[f"steps.{plan}"] = torch_steps(steps, arrays, dropped=dropped)
    if steps is not None:
        tensors["steps.ends"] = torch.tensor(_ends(arrays, steps))
    metadata = {"plans": json.dumps(plans)}  # of two entries, safetensors would write either first
    # save_file would make a file that only its owner may read, whatever the umask.
    content = save({name: value.contiguous() for name, value in tensors.items()}, metadata=metadata)
    write_atomically(path, content)


def _num_tokens(vocabulary: int, *, longest: int | None) -> int:
    """Tokens of each row: what the model has positions for, and what keeps a plan's logits small."""
    fitting = _LOGITS_BYTES // (4 * _BATCH * vocabulary) if vocabulary else _MOST_TOKENS
    return min(max(fitting, _FEWEST_TOKENS), _MOST_TOKENS, longest or _MOST_TOKENS)


def torch_step(
    program: Program, anatomy: Anatomy, batch: dict[str, Tensor], *, dropped: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Loss, logits and gradients of one eager step with the layers in ``dropped`` replaced by the identity."""
    parameters = {n: p for n, p in program.module.named_parameters() if p.requires_grad}
    with torch.enable_grad(), without(anatomy, dropped):
        logits = program.logits(batch)
        loss = program.loss(logits, batch[program.label_name])
        learns = bool(parameters) and loss.requires_grad  # not if the only layer that learns is dropped
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if learns else ()
    found = {
        f"grad.{program.names.get(n, n)}": g
        for n, g in zip(parameters, grads, strict=learns)
        if g is not None
    }
    return {"loss": loss.detach(), "logits": logits.detach(), **found}


def torch_steps(steps: Steps, batch: dict[str, Tensor], *, dropped: Sequence[int] = ()) -> Tensor:
    """Logits (parts, batch, classes) of the last token of each part, each read with what is remembered of those before."""
    pairs: Sequence[Pair] = ()
    found, start = [], 0
    for end in _ends(batch, steps):
        steps.past.start(start, pairs)
        with torch.no_grad(), without(steps.anatomy, dropped):
            found.append(steps.program.logits(part_of(steps.program, batch, slice(start, end)))[:, -1])
        pairs, start = steps.past.made, end
    return torch.stack(found)


def _ends(batch: dict[str, Tensor], steps: Steps) -> list[int]:
    """Where each part ends: most tokens at once, then one, then the rest."""
    count = batch[_ids(steps)].shape[1]
    return [count - 4, count - 3, count]


def _ids(steps: Steps) -> str:
    return steps.program.stepping.ids if steps.program.stepping else ""


def without(anatomy: Anatomy, dropped: Sequence[int]) -> AbstractContextManager[None]:
    """The layers in ``dropped`` as the identity."""
    gone = set(dropped)
    stand_ins: list[StandIn | None] = [
        _identity(c) if i in gone else None for i, c in enumerate(anatomy.calls)
    ]
    return replaced(anatomy, stand_ins)


def _identity(call: Call) -> StandIn:
    return lambda leaves: leaves[call.hidden]


@contextmanager
def _perturbed(program: Program) -> Iterator[dict[str, Tensor]]:
    parameters = dict(program.module.named_parameters())
    trained = {n: parameters[n] for n in trainable_names(program.module)}
    before = {n: p.detach().clone() for n, p in trained.items()}
    noise = {n: torch.randint(-NOISE, NOISE + 1, p.shape, dtype=torch.int8) for n, p in trained.items()}
    with torch.no_grad():
        for n, p in trained.items():
            p.add_(noise[n] * NOISE_STEP)
    try:
        yield {program.names.get(n, n): units for n, units in noise.items()}
    finally:
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(before[n])
