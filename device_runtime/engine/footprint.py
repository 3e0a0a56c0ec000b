"""What a step takes: the expected peak of resident memory, and the arithmetic of a forward."""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import (
    UNPACKED_BYTES,
    Layer,
    Manifest,
    Port,
    Tensor,
    extent,
)
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, active_layers, learnable, route
from fleetune.device_runtime.engine.token_head import chunk_bytes
from fleetune.device_runtime.engine.weights import stays_through_head
from fleetune.device_runtime.errors import ConfigError

BARE_BYTES = 54_000_000
"""Measured: resident memory of a process that has numpy and onnxruntime imported and nothing else."""
PROCESS_BYTES = 78_000_000
"""Measured: the same with graphs open and run, without their values."""
COMMAND_BYTES = 32_000_000
"""Measured: what ``fleetune train`` holds beside that: command line, tokenizer, and some thousand short texts."""
_WORKING_COPIES = 4
"""Measured: while a backward runs, about this many values the size of its largest are alive beside what was saved."""
_LOGITS_COPIES, _PACKED_LOGITS_COPIES = 4, 5
"""Measured: of a chunk's logits, while the head makes their loss and gradient; more where pieces of its matrix come between."""
_HEAD_PIECES, _BLOCK_PIECES = 5, 4
"""Measured: of a packed matrix, in the fp32 pieces that a product reads at a time, with what they are made through."""
_MAPPED_AROUND, _MAPPED_SCATTERED = 2**21, 2**16
"""Bytes of a mapped file that become resident with each place read. Measured on Linux 6.18, ext4: 2 MiB in a file just written,
whose pages lie in large folios; 64 KiB in a table that streaming scatters (``Artifact.scatter``)."""


class Footprint(NamedTuple):
    """Bytes. ``weights`` are the frozen ones resident at once, ``saved`` what the way back keeps, ``peak`` the whole process."""

    saved: int
    weights: int
    peak: int


class _Sizes(NamedTuple):
    batch: int
    seq: int
    hidden: int
    """The hidden stream."""


def footprint(
    artifact: Artifact,
    plan: LayerPlan,
    *,
    batch_size: int,
    seq_len: int,
    memory: MemoryPlan = SAVE_ALL,
    lanes: int = 1,
    also_read: Collection[int] = (),
) -> Footprint:
    """Expected peak of a training process.

    Args:
        artifact: an opened artifact.
        plan: one mode per layer.
        batch_size: rows of a step.
        seq_len: tokens of a row.
        memory: how they are held.
        lanes: on which the rows run; each may be at another layer, whose streamed weights are resident then.
        also_read: layers that other steps run; their frozen weights stay resident too, unless they are streamed.

    Raises:
        ConfigError: the artifact holds whole models, whose memory is not known.
    """
    m = artifact.manifest
    if holds_whole_models(m):
        raise ConfigError(
            f"backend {m.backend}: the memory of its models cannot be estimated; leave the budget out"
        )
    rows = memory.together(batch_size, seq_len, lanes)
    sizes = _Sizes(rows, seq_len, _hidden_bytes(m, _Sizes(rows, seq_len, 0)))
    way = route(learnable(plan, m.learning), memory)
    active, rerun, saving = ([m.layers[i] for i in some] for some in (way.layers, way.rerun, way.saved))
    tape = len(way.back) * sizes.hidden + sum(_saved_bytes(m, layer, sizes) for layer in saving)
    read = [m.layers[i] for i in sorted({*way.layers, *also_read})]
    prelude, layers, head = _weights(m, read, sizes, streamed=memory.streamed)
    whole = prelude + sum(layers) + head
    beside_head = head + (max(layers, default=0) if stays_through_head(m) else 0)
    weights = min(lanes * max(prelude, beside_head, *layers), whole) if memory.streamed else whole
    # onnxruntime's arena gives nothing back: the most of it stands beside the most of the weights, even at another time.
    unpacked = lanes * _BLOCK_PIECES * _piece(m, {i for layer in read for i in layer.tensors})
    values = max(
        2 * sizes.hidden,
        _working(m, active, sizes) + unpacked + tape,
        _recomputing(m, rerun, sizes) + unpacked,
        tape + _head_bytes(m, sizes, lanes),
    )
    return Footprint(tape, weights, PROCESS_BYTES + _optimizer_bytes(m) + weights + values)


def largest_footprint(
    artifact: Artifact,
    plan: LayerPlan,
    *,
    batch_size: int,
    seq_len: int,
    memory: MemoryPlan = SAVE_ALL,
    lanes: int = 1,
    also_read: Collection[int] = (),
) -> Footprint:
    """The footprint of batches of up to ``seq_len`` tokens; where tokens bound a micro-batch, narrower ones may take more.

    Arguments and errors as of :func:`footprint`.
    """
    of = partial(
        footprint, artifact, plan, batch_size=batch_size, memory=memory, lanes=lanes, also_read=also_read
    )
    return max((of(seq_len=tokens) for tokens in memory.widths(seq_len)), key=lambda found: found.peak)


def forward_flop(artifact: Artifact, plan: LayerPlan, *, batch_size: int, seq_len: int) -> int:
    """Floating-point operations of one forward through the active layers."""
    m = artifact.manifest
    active = [m.layers[i] for i in active_layers(plan)]
    rows = [m.tensors[i] for layer in active for i in layer.tensors]
    matrices = sum(_num_weights(row) for row in rows if len(row.shape) == 2 or _is_int4(row))
    attention = 4 * len(active) * batch_size * seq_len**2 * m.hidden_size
    return 2 * batch_size * seq_len * matrices + attention


def holds_whole_models(m: Manifest) -> bool:
    """Whether the artifact has no graphs of blocks (``ort-training``)."""
    return not any(kind.graphs for kind in m.kinds)


def count_of(shape: Sequence[int]) -> int:
    """Number of elements."""
    return int(np.prod(shape, dtype=np.int64))


def _weights(
    m: Manifest, read: Sequence[Layer], sizes: _Sizes, *, streamed: bool
) -> tuple[int, list[int], int]:
    """Frozen bytes that get read: of the prelude, of each layer, of the head; what is shared counts once.

    Of an embedding table the rows of the batch's tokens are read, and the kernel maps in what lies around each.
    """
    seen: set[int] = set()
    places, around = sizes.batch * sizes.seq, _MAPPED_SCATTERED if streamed else _MAPPED_AROUND

    def fresh(slots: Sequence[int]) -> list[Tensor]:
        rows = [i for i in dict.fromkeys(slots) if i not in seen and not m.tensors[i].trainable]
        seen.update(rows)
        return [m.tensors[i] for i in rows]

    layers = [sum(row.size_bytes for row in fresh(layer.tensors)) for layer in read]
    head = sum(row.size_bytes for row in fresh(m.head.tensors))
    tables = fresh(m.prelude.tensors)
    return sum(min(row.size_bytes, places * around) for row in tables), layers, head


def _piece(m: Manifest, slots: Collection[int], *, rows: bool = False) -> int:
    """Bytes of the largest packed matrix as far as it is fp32 at a time; ``rows``: an int8 one is unpacked too."""
    packed = [row for i in slots if _is_int4(row := m.tensors[i]) or (rows and row.dtype == "int8")]
    return min(max((4 * _num_weights(row) for row in packed), default=0), UNPACKED_BYTES)


def _is_int4(row: Tensor) -> bool:
    """Whether the tensor holds two weights of a matrix in each byte, (N, groups, bytes)."""
    return row.dtype == "uint8" and len(row.shape) == 3


def _num_weights(row: Tensor) -> int:
    return count_of(row.shape) * (2 if _is_int4(row) else 1)


def _working(m: Manifest, layers: Sequence[Layer], sizes: _Sizes) -> int:
    """What a graph of a layer has alive beside what is kept for it."""
    largest = (
        max((_port_bytes(port, sizes) for port in _saved_ports(m, layer)), default=0) for layer in layers
    )
    return _WORKING_COPIES * max(largest, default=sizes.hidden)


def _recomputing(m: Manifest, layers: Sequence[Layer], sizes: _Sizes) -> int:
    """The way back through layers whose forward runs again: their inputs, and one layer's activations."""
    if not layers:
        return 0
    again = max(_saved_bytes(m, layer, sizes) for layer in layers)
    return len(layers) * sizes.hidden + again + _working(m, layers, sizes)


def _head_bytes(m: Manifest, sizes: _Sizes, lanes: int) -> int:
    """Logits, their loss and gradient; where the head works in chunks, of one chunk."""
    logits = next(port for port in m.head.graphs["train"].outputs if port.role == "logits")
    if m.head.targets is None:
        return _LOGITS_COPIES * _port_bytes(logits, sizes) + 2 * sizes.hidden
    piece = _piece(m, m.head.tensors, rows=True)
    whole = 4 * sizes.batch * sizes.seq * m.num_logits
    chunk = min(whole, lanes * chunk_bytes(m.num_logits, lanes=lanes))
    copies = _PACKED_LOGITS_COPIES if piece else _LOGITS_COPIES
    return copies * chunk + lanes * _HEAD_PIECES * piece + 3 * sizes.hidden


def _hidden_bytes(m: Manifest, sizes: _Sizes) -> int:
    return next(_port_bytes(p, sizes) for p in m.kinds[0].graphs["forward"].inputs if p.role == "hidden")


def _saved_ports(m: Manifest, layer: Layer) -> Iterable[Port]:
    graph = m.kinds[layer.kind].graphs.get("forward_save")
    return [] if graph is None else [port for port in graph.outputs if port.role == "saved"]


def _saved_bytes(m: Manifest, layer: Layer, sizes: _Sizes) -> int:
    return sum(_port_bytes(port, sizes) for port in _saved_ports(m, layer))


def _port_bytes(port: Port, sizes: _Sizes) -> int:
    extents = [extent(e, batch=sizes.batch, seq=sizes.seq) for e in port.shape]
    return count_of(extents) * np.dtype(port.dtype).itemsize


def _optimizer_bytes(m: Manifest) -> int:
    """Adapter, its gradients, and AdamW's two moments."""
    return 4 * sum(t.size_bytes for t in m.trainable)
