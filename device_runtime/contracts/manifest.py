"""What an artifact says of itself: ``manifest.json``.

Graphs name nothing by convention. Every input and output of a graph is a :class:`Port` whose ``role`` and ``index`` say what
it carries, and every weight slot of a section or layer is an index into the tensor table.
"""

import math
from typing import Any, Literal

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Array

FORMAT = 2
"""2: int8 weights are at most 64, inputs have a role. What 1 was is turned into this by ``artifact``, or refused."""
LOGITS_BYTES = 16 * 1024**2
"""Of one chunk, where a head works a few tokens at a time; its loss and gradient take about three times as much again."""
LEAST_TOKENS = 64
"""Of one chunk, however large the vocabulary: each chunk reads the whole head, there and back."""
UNPACKED_BYTES = 16 * 1024**2
"""Of a packed matrix that a product reads: no larger piece of it is fp32 at a time."""

STEP, FORWARD_STEP = "step", "forward_step"
"""Purposes of the graphs of the prelude and of a kind that run on new tokens alone."""

Role = Literal[
    "batch",  # in: manifest.inputs[index]
    "hidden",  # in and out: the stream that flows through the blocks
    "side",  # out of the prelude: side[index]; into a block: layer.sides[index]; into the head: side[index]
    "weight",  # in: the tensor in slot `index` of the section or layer
    "saved",  # out of forward_save, into backward: saved[index]; of a step keys and values of the tokens before, and of all
    "d_hidden",  # into a backward: gradient of its output; out of it and of the head: gradient of its input
    "d_weight",  # out: gradient of the tensor in slot `index`
    "loss",
    "logits",
]
TensorFile = Literal["base", "adapter"]
ProblemType = Literal["", "regression", "multi_label_classification"]
"""What a row's label is, in the words of transformers: one class (empty), a number for each output, or any of the labels."""


class Port(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph; symbolic dimensions are strings."""

    name: str
    role: Role
    dtype: str
    shape: tuple[int | str, ...]
    index: int = 0


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph file with its ports in the order the file declares them."""

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of the tensor table. ``offset`` counts bytes from the start of the file, ``layer`` is -1 outside the blocks."""

    name: str
    file: TensorFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    layer: int = -1
    trainable: bool = False

    @property
    def size_bytes(self) -> int:
        """In its file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Targets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How labels (batch, seq) or (batch,) become targets: moved ``shift`` places to the left; ``ignored`` counts for nothing."""

    shift: int
    ignored: int


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The prelude or the head: its graphs by purpose, and the tensor of each weight slot.

    A head with ``targets`` works token by token: its graphs take any tokens (1, rows) with their targets in the place of the
    labels, and its loss is a sum, so that it can be run over a few rows at a time. ``counted`` says what the loss of any batch
    is a mean over: its rows, or the labels that have a target. Manifests of before leave it empty; ``artifact`` fills it in.
    """

    graphs: dict[str, Graph]
    tensors: tuple[int, ...] = ()
    targets: Targets | None = None
    counted: Targets | Literal["rows", ""] = ""


class Kind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Blocks of equal structure share these graphs: forward, forward_save, backward, backward_recompute, perhaps forward_step."""

    graphs: dict[str, Graph]


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One block: its kind, the tensor of each weight slot, and the prelude side output of each side slot."""

    kind: int
    tensors: tuple[int, ...]
    sides: tuple[int, ...] = ()


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One array of a batch. ``pad`` fills what padding adds; ``shape`` uses ``batch`` and ``seq`` as symbols."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    pad: float = 0
    role: Literal["", "labels"] = ""
    """``labels``: what the model is to answer; prediction does without."""
    below: int = 0
    """Ids run from 0 to this, exclusive; 0 where there is no such limit."""

    def __str__(self) -> str:
        """Dtype and shape, for a message."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def fits(self, array: Array, symbols: dict[str, int]) -> bool:
        """Whether ``array`` has this dtype and shape; ``symbols`` are extents bound so far, and gains those met first."""
        if array.dtype != np.dtype(self.dtype) or array.ndim != len(self.shape):
            return False
        return all(
            extent == (symbols.setdefault(want, extent) if isinstance(want, str) else want)
            for extent, want in zip(array.shape, self.shape, strict=True)
        )


class Tokenizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How text becomes arrays: a file of the ``tokenizers`` library."""

    file: str
    pad_id: int
    max_length: int
    truncation_side: Literal["left", "right"] = "right"
    """At which end a text that is too long loses tokens."""
    chat_template: str = ""
    """File of the Jinja template that writes a chat as text, as transformers has it; empty where the model came with none."""
    special_tokens: dict[str, str] = {}
    """What the template may name, by the name: ``bos_token``, ``eos_token`` (which ends a text) and others."""

    @property
    def end_of_text(self) -> str:
        """The token that ends a text; empty where there is none."""
        return self.special_tokens.get("eos_token", "")


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model that was exported, beside its name in ``peft``; empty where nobody knows."""

    kind: Literal["", "folder", "hub"] = ""
    sha256: str = ""
    """Of its frozen parameters in float32, in whatever order: a model with others is not the one."""
    seed: int = 0
    """That drew what its checkpoint lacks."""


class FileDigest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must be: its SHA-256 in hexadecimal and its size."""

    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a device needs to know before it reads a weight.

    ``bounds``: largest batch and seq, where the model's positions or a backend set any. ``labels`` are the names of the classes,
    of a regression those of its outputs.
    """

    format: int
    name: str
    architecture: str
    task: str
    backend: str
    labels: tuple[str, ...]
    inputs: tuple[Input, ...]
    prelude: Section
    kinds: tuple[Kind, ...]
    layers: tuple[Layer, ...]
    head: Section
    tensors: tuple[Tensor, ...]
    files: dict[str, FileDigest]
    hidden_size: int
    peft: dict[str, Any]
    base_dtype: str = "fp32"
    tokenizer: Tokenizer | None = None
    origin: Origin = Origin()
    bounds: dict[str, int] = {}
    licences: dict[str, str] = {}
    versions: dict[str, str] = {}
    problem_type: ProblemType = ""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def trainable(self) -> tuple[Tensor, ...]:
        """The tensors of the adapter, in table order."""
        return tuple(t for t in self.tensors if t.trainable)

    @property
    def features(self) -> tuple[Input, ...]:
        """The inputs that are no labels."""
        return tuple(row for row in self.inputs if row.role != "labels")

    @property
    def counted(self) -> Targets | None:
        """Which labels a mean loss is taken over; None where it is one over rows."""
        found = self.head.counted
        return found if isinstance(found, Targets) else None

    @property
    def learning(self) -> frozenset[int]:
        """The layers that have something to train."""
        trainable = {i for i, row in enumerate(self.tensors) if row.trainable}
        return frozenset(i for i, layer in enumerate(self.layers) if trainable.intersection(layer.tensors))

    @property
    def layer_adapters(self) -> tuple[frozenset[str], ...]:
        """Names of the tensors that each layer has to train; a tensor of two layers is in both."""
        names = {i: row.name for i, row in enumerate(self.tensors) if row.trainable}
        return tuple(frozenset(names[i] for i in layer.tensors if i in names) for layer in self.layers)

    @property
    def num_logits(self) -> int:
        """Width of the logits: classes, or the vocabulary."""
        return next(int(p.shape[-1]) for p in self.head.graphs["train"].outputs if p.role == "logits")

    @property
    def has_steps(self) -> bool:
        """Whether it runs on new tokens alone, with keys and values of those before."""
        return STEP in self.prelude.graphs and all(FORWARD_STEP in kind.graphs for kind in self.kinds)

    @property
    def label_index(self) -> int:
        """Place of the labels among the inputs."""
        return [row.role for row in self.inputs].index("labels")

    @property
    def label_name(self) -> str:
        """Name of the input that holds the labels."""
        return self.inputs[self.label_index].name


def extent(expression: int | str, *, batch: int, seq: int) -> int:
    """Value of a dimension such as ``8``, ``batch`` or ``(2*batch*seq)``; any symbol but ``batch`` is taken for ``seq``."""
    factors = str(expression).replace("(", "").replace(")", "").split("*")
    return math.prod(
        int(f) if f.isdigit() else batch if f == "batch" else seq for f in map(str.strip, factors)
    )
