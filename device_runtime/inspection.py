"""``fleetune inspect``: what an artifact holds, and what training it will take."""

from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from device_runtime.artifact import Artifact, open_artifact
from device_runtime.errors import ConfigError
from device_runtime.manifest import Kind, Manifest, Port, Section, Tensor
from device_runtime.plans import LayerPlan, dropping

PROCESS_BYTES = 78_000_000
"""Measured: resident memory of a process that has numpy and onnxruntime loaded and nothing else."""
_WORKING_COPIES = 4
"""Measured: while a backward runs, about this many values the size of its largest are alive beside what was saved."""

_MAPPED_AROUND = 2**20
"""Measured: bytes of a mapped file that become resident with each place read (Linux 6.18, ext4: folios of up to 2 MiB)."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Expected peak of one plan at one batch and sequence size; ``weights`` are the frozen ones that get read."""

    plan: str
    active_layers: int
    batch_size: int
    seq_len: int
    recompute: bool
    saved_mb: float
    weights_mb: float
    peak_mb: float
    forward_gflop: float


class GraphSize(msgspec.Struct, frozen=True, kw_only=True):
    """One graph file and what it takes and gives."""

    file: str
    size_bytes: int
    inputs: int
    outputs: int


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """The artifact in numbers."""

    name: str
    architecture: str
    task: str
    backend: str
    base_dtype: str
    digest: str
    num_layers: int
    num_kinds: int
    hidden_size: int
    num_labels: int
    max_length: int | None
    base_bytes: int
    adapter_parameters: int
    graphs: list[GraphSize]
    estimates: list[Estimate]
    licences: dict[str, str]


def inspect(
    folder: str | Path, *, batch_sizes: tuple[int, ...] = (1, 8, 16), seq_lens: tuple[int, ...] = (64, 128)
) -> Inspection:
    """Describe an artifact and estimate memory and arithmetic per plan, batch and sequence.

    ``estimates`` are empty for ``ort-training``: nothing in its models says what they save for the way back.

    Raises:
        ArtifactError: it does not open.
    """
    artifact = open_artifact(folder)
    m = artifact.manifest
    plans = {
        "full": dropping(m.num_layers, ()),
        "half": dropping(m.num_layers, range(1, m.num_layers, 2)),
    }
    if _holds_whole_models(m):
        plans = {}
    return Inspection(
        name=m.name,
        architecture=m.architecture,
        task=m.task,
        backend=m.backend,
        base_dtype=m.base_dtype,
        digest=artifact.digest,
        num_layers=m.num_layers,
        num_kinds=len(m.kinds),
        hidden_size=m.hidden_size,
        num_labels=len(m.labels),
        max_length=m.tokenizer.max_length if m.tokenizer else None,
        base_bytes=sum(_size_bytes(t) for t in m.tensors if not t.trainable),
        adapter_parameters=sum(_count(t.shape) for t in m.trainable),
        graphs=list(_graph_sizes(m)),
        estimates=[
            estimate(artifact, plan, name=name, batch_size=b, seq_len=s, recompute=recompute)
            for name, plan in plans.items()
            for b in batch_sizes
            for s in seq_lens
            for recompute in (False, True)
        ],
        licences=m.licences,
    )


def estimate(
    artifact: Artifact, plan: LayerPlan, *, name: str, batch_size: int, seq_len: int, recompute: bool = False
) -> Estimate:
    """Expected peak resident memory of a training process, in MB (10^6 bytes), and GFLOP of one forward.

    Raises:
        ConfigError: the artifact holds whole models, whose memory is not known.
    """
    m = artifact.manifest
    if _holds_whole_models(m):
        raise ConfigError(
            f"backend {m.backend}: the memory of its models cannot be estimated; leave the budget out"
        )
    sizes = {"batch": batch_size, "seq": seq_len}
    active = [layer for layer, mode in zip(m.layers, plan, strict=True) if mode]
    hidden = 4 * batch_size * seq_len * m.hidden_size
    saved = sum(hidden + (0 if recompute else _saved_bytes(m, layer.kind, sizes)) for layer in active)
    read = {i for layer in active for i in layer.tensors} | set(m.head.tensors)
    weights = sum(_size_bytes(m.tensors[i]) for i in read if not m.tensors[i].trainable) + _prelude_bytes(
        m, sizes
    )
    working = _WORKING_COPIES * max(
        (_largest_saved(m, layer.kind, sizes) for layer in active), default=hidden
    )
    if recompute and active:
        working += _saved_bytes(m, active[0].kind, sizes)
    matrices = sum(
        _count(m.tensors[i].shape) for layer in active for i in layer.tensors if len(m.tensors[i].shape) == 2
    )
    attention = 4 * len(active) * batch_size * seq_len**2 * m.hidden_size
    return Estimate(
        plan=name,
        active_layers=len(active),
        batch_size=batch_size,
        seq_len=seq_len,
        recompute=recompute,
        saved_mb=round(saved / 1e6, 1),
        weights_mb=round(weights / 1e6, 1),
        peak_mb=round((PROCESS_BYTES + saved + weights + working + _optimizer_bytes(m)) / 1e6, 1),
        forward_gflop=round((2 * batch_size * seq_len * matrices + attention) / 1e9, 3),
    )


def _holds_whole_models(m: Manifest) -> bool:
    return not any(kind.graphs for kind in m.kinds)


def _saved_ports(m: Manifest, kind: int) -> Iterable[Port]:
    graph = m.kinds[kind].graphs.get("forward_save")
    return [] if graph is None else [port for port in graph.outputs if port.role == "saved"]


def _saved_bytes(m: Manifest, kind: int, sizes: dict[str, int]) -> int:
    return sum(_port_bytes(port, sizes) for port in _saved_ports(m, kind))


def _largest_saved(m: Manifest, kind: int, sizes: dict[str, int]) -> int:
    return max((_port_bytes(port, sizes) for port in _saved_ports(m, kind)), default=0)


def _port_bytes(port: Port, sizes: dict[str, int]) -> int:
    count = 1
    for extent in port.shape:
        count *= extent if isinstance(extent, int) else _extent(extent, sizes)
    return count * np.dtype(port.dtype).itemsize


def _extent(expression: str, sizes: dict[str, int]) -> int:
    product = 1
    for factor in expression.replace("(", "").replace(")", "").split("*"):
        symbol = factor.strip()
        product *= int(symbol) if symbol.isdigit() else sizes.get(symbol, sizes["seq"])
    return product


def _prelude_bytes(m: Manifest, sizes: dict[str, int]) -> int:
    """Of an embedding table the rows of the batch's tokens are read, and the kernel maps in what lies around each."""
    touched = sizes["batch"] * sizes["seq"] * _MAPPED_AROUND
    return sum(min(_size_bytes(m.tensors[i]), touched) for i in m.prelude.tensors)


def _optimizer_bytes(m: Manifest) -> int:
    """Adapter, its gradients, and AdamW's two moments."""
    return 4 * sum(_size_bytes(t) for t in m.trainable)


def _graph_sizes(m: Manifest) -> Iterable[GraphSize]:
    sections: tuple[Section | Kind, ...] = (m.prelude, *m.kinds, m.head)
    for section in sections:
        for graph in section.graphs.values():
            size = m.files[graph.file].size_bytes
            yield GraphSize(
                file=graph.file, size_bytes=size, inputs=len(graph.inputs), outputs=len(graph.outputs)
            )


def _size_bytes(tensor: Tensor) -> int:
    return _count(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
