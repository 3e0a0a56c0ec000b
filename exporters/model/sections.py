"""The three kinds of function that an artifact is made of: the prelude, a block's joint step, and the head's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from fleetune.device_runtime.contracts.manifest import Role, Targets
from fleetune.device_runtime.errors import ExportError, some
from fleetune.exporters.model.anatomy import Anatomy, Call, replaced, stream
from fleetune.exporters.model.program import Program, check_mean, tensors_of, trainable_names

T = TypeVar("T")


@dataclass(frozen=True)
class Argument:
    """One input of a section's function: the role it plays, its example, and for weights the tensor's full name."""

    role: Role
    index: int
    example: Tensor
    name: str = ""

    @property
    def is_data(self) -> bool:
        """Whether batch and sequence may vary."""
        return self.role != "weight"


@dataclass(frozen=True)
class SectionFunction:
    """A traceable function with the roles of what goes in and comes out. ``slots`` are full tensor names.

    With ``targets`` it is a head that works token by token: any tokens and their targets -> sum of their losses. ``trained``
    are slots that learn, though no gradient of them is among the results.
    """

    what: str
    function: Callable[..., Sequence[Tensor]]
    arguments: tuple[Argument, ...]
    results: tuple[tuple[Role, int], ...]
    slots: tuple[str, ...]
    targets: Targets | None = None
    trained: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Sections(Generic[T]):
    """Something of the prelude, of each kind of block, and of the head."""

    prelude: T
    kinds: list[T]
    head: T

    def __iter__(self) -> Iterator[T]:
        """In the order of a forward pass."""
        return iter((self.prelude, *self.kinds, self.head))


def functions_of(
    program: Program, anatomy: Anatomy, kinds: Sequence[Call], *, sizes: tuple[int, int]
) -> Sections[SectionFunction]:
    """The function of every section; ``kinds`` are one call of each kind of block, ``sizes`` those of ``anatomy``."""
    return Sections(
        prelude(program, anatomy, sizes=sizes),
        [block(call, prefix=f"{call.path}.") for call in kinds],
        head(program, anatomy, sizes=sizes),
    )


def prelude(program: Program, anatomy: Anatomy, *, sizes: tuple[int, int]) -> SectionFunction:
    """Batch -> the first block's input, and every distinct side tensor."""
    batch = program.make_batch(*sizes)
    inputs = _batch_arguments(program, batch, without=program.label_name)
    weights = _weights(program)
    sides = anatomy.sides

    def function(*values: Tensor) -> Sequence[Tensor]:
        recorded: list[list[Tensor]] = []

        def keep(leaves: list[Tensor]) -> Tensor:
            recorded.append(leaves)
            return leaves[anatomy.calls[0].hidden]

        with replaced(anatomy, [keep] * len(anatomy.calls)), torch.no_grad():
            _call(program, values, inputs, weights)
        return recorded[0][anatomy.calls[0].hidden], *(recorded[layer][leaf] for layer, leaf in sides)

    results: list[tuple[Role, int]] = [("hidden", 0), *(("side", i) for i in range(len(sides)))]
    return SectionFunction(
        "prelude", function, (*inputs, *weights), tuple(results), tuple(w.name for w in weights)
    )


def head(program: Program, anatomy: Anatomy, *, sizes: tuple[int, int]) -> SectionFunction:
    """The last block's output, labels and batch -> loss, logits, gradient of that output and of the head's trainables.

    If the program's loss is one over tokens and the head works token by token, so does the section, on targets for labels.
    """
    batch = program.make_batch(*sizes)
    chunked = program.token_loss if _is_token_wise(program, anatomy, batch) else None
    loss_of = chunked or program.loss
    inputs = _batch_arguments(program, batch)
    weights = _weights(program)
    trained = _head_trainables(program, anatomy, batch)
    hidden = Argument("hidden", 0, stream(anatomy.calls[-1].output).detach())

    def function(*values: Tensor) -> Sequence[Tensor]:
        with torch.enable_grad():
            start = values[0].detach().requires_grad_(True)
            given = [
                _learning(v, w, trained) for v, w in zip(values[1 + len(inputs) :], weights, strict=True)
            ]
            logits = _inject(program, anatomy, start, (*values[1 : 1 + len(inputs)], *given), inputs, weights)
            loss = loss_of(logits, values[1:][[i.name for i in inputs].index(program.label_name)])
            wanted = [g for g, w in zip(given, weights, strict=True) if w.name in trained]
            return loss, logits, *torch.autograd.grad(loss, (start, *wanted))

    slots = tuple(w.name for w in weights)
    results: list[tuple[Role, int]] = [("loss", 0), ("logits", 0), ("d_hidden", 0)]
    results += [("d_weight", i) for i, name in enumerate(slots) if name in trained]
    targets = program.counted if chunked else None
    return SectionFunction("head", function, (hidden, *inputs, *weights), tuple(results), slots, targets)


def whole(program: Program, *, sizes: tuple[int, int]) -> SectionFunction:
    """Batch without labels -> logits, by the model as it is."""
    inputs = _batch_arguments(program, program.make_batch(*sizes), without=program.label_name)
    weights = _weights(program)

    def function(*values: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return (_call(program, values, inputs, weights),)

    what = type(program.module).__name__
    return SectionFunction(
        what, function, (*inputs, *weights), (("logits", 0),), tuple(w.name for w in weights)
    )


def block(call: Call, *, prefix: str) -> SectionFunction:
    """Input, sides and the gradient of the output -> output, gradient of the input and of the block's trainables."""
    tensors = tensors_of(call.module)
    trained = set(trainable_names(call.module))
    hidden = call.leaves[call.hidden].detach()
    arguments = [
        Argument("hidden", 0, hidden),
        Argument("d_hidden", 0, torch.randn_like(hidden)),
        *(Argument("side", i, call.leaves[s].detach()) for i, s in enumerate(call.sides)),
        *(Argument("weight", i, t.detach(), name) for i, (name, t) in enumerate(tensors.items())),
    ]
    num_sides = len(call.sides)

    def function(x: Tensor, dy: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            weights = {
                n: (w.detach().requires_grad_(True) if n in trained else w)
                for n, w in zip(tensors, rest[num_sides:], strict=True)
            }
            args, kwargs = call.arguments(x, rest[:num_sides])
            y = stream(functional_call(call.module, weights, args, kwargs))
            wanted = [w for n, w in weights.items() if n in trained]
            return y, *torch.autograd.grad(y, (x, *wanted), dy)

    results: list[tuple[Role, int]] = [("hidden", 0), ("d_hidden", 0)]
    results += [("d_weight", i) for i, name in enumerate(tensors) if name in trained]
    return SectionFunction(
        call.path, function, tuple(arguments), tuple(results), tuple(f"{prefix}{n}" for n in tensors)
    )


def _batch_arguments(program: Program, batch: dict[str, Tensor], *, without: str = "") -> list[Argument]:
    rows = enumerate(program.inputs)
    return [Argument("batch", i, batch[row.name], row.name) for i, row in rows if row.name != without]


def _weights(program: Program) -> list[Argument]:
    return [
        Argument("weight", i, t.detach(), name)
        for i, (name, t) in enumerate(tensors_of(program.module).items())
    ]


def _call(
    program: Program, values: Sequence[Tensor], inputs: list[Argument], weights: list[Argument]
) -> Tensor:
    batch = {a.name: v for a, v in zip(inputs, values, strict=False) if a.name != program.label_name}
    tensors = {w.name: v for w, v in zip(weights, values[len(inputs) :], strict=True)}
    return program.read_logits(functional_call(program.module, tensors, (), batch | program.beside(batch)))


def _inject(
    program: Program,
    anatomy: Anatomy,
    start: Tensor,
    values: Sequence[Tensor],
    inputs: list[Argument],
    weights: list[Argument],
) -> Tensor:
    with replaced(anatomy, [lambda _leaves: start] * len(anatomy.calls)):
        return _call(program, values, inputs, weights)


def _learning(value: Tensor, weight: Argument, trained: set[str]) -> Tensor:
    return value.detach().requires_grad_(True) if weight.name in trained else value


def _is_token_wise(program: Program, anatomy: Anatomy, batch: dict[str, Tensor]) -> bool:
    """Whether logits depend on their own token's hidden state alone: not on another's, nor on what the batch says."""
    hidden = stream(anatomy.calls[-1].output).detach()
    if program.token_loss is None or program.counted is None or hidden.ndim != 3:
        return False
    changed, place = hidden.clone(), hidden.shape[1] // 2
    changed[:, place] = hidden[:, place].flip(-1) + 1
    unpadded = {n: t if t.is_floating_point() else torch.ones_like(t) for n, t in batch.items()}
    with torch.no_grad():
        before, after = (_logits_after(program, anatomy, (h, batch)) for h in (hidden, changed))
        other = _logits_after(program, anatomy, (hidden, unpadded))
    if before.shape[:2] != hidden.shape[:2] or not torch.equal(before, other):
        return False
    same = (before == after).all(-1)
    return bool(same[:, :place].all() and same[:, place + 1 :].all() and not same[:, place].any())


def _logits_after(program: Program, anatomy: Anatomy, given: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
    hidden, batch = given
    with replaced(anatomy, [lambda _leaves: hidden] * len(anatomy.calls)):
        return program.logits(batch)


def _head_trainables(program: Program, anatomy: Anatomy, batch: dict[str, Tensor]) -> set[str]:
    """Trainables outside the blocks that the loss depends on when the last block's output is held fixed."""
    inside = {id(p) for call in anatomy.calls for p in call.module.parameters()}
    parameters = dict(program.module.named_parameters())
    names = [n for n in trainable_names(program.module) if id(parameters[n]) not in inside]
    start = stream(anatomy.calls[-1].output).detach().requires_grad_(True)
    with torch.enable_grad(), replaced(anatomy, [lambda _leaves: start] * len(anatomy.calls)):
        logits, labels = program.logits(batch), batch[program.label_name]
        loss = program.loss(logits, labels)
    check_mean(program, logits, labels)
    grads = torch.autograd.grad(loss, [start, *(parameters[n] for n in names)], allow_unused=True)[1:]
    stray = [n for n, g in zip(names, grads, strict=True) if g is None]
    if stray:
        raise ExportError(
            f"trainable tensors before the blocks cannot learn on the device: {some(stray, at_most=3)}; "
            f"the blocks are those of {anatomy.path} (one list: of a model in stages or with an encoder and a decoder, "
            "the largest), choose targets inside it"
        )
    return set(names)
