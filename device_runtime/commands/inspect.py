"""``fleetune inspect``: what an artifact holds, and what training it will take."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.manifest import Kind, Manifest, Section
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL
from fleetune.device_runtime.contracts.plans import LayerPlan, active_layers, dropping
from fleetune.device_runtime.engine.footprint import (
    COMMAND_BYTES,
    count_of,
    footprint,
    forward_flop,
    holds_whole_models,
)


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Expected peak of one plan at one batch and sequence size, in MB of 10^6 bytes.

    ``half`` is every second layer, and others in other steps: ``weights`` are the frozen ones of all steps.
    """

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
    if holds_whole_models(m):
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
        base_bytes=sum(t.size_bytes for t in m.tensors if not t.trainable),
        adapter_parameters=sum(count_of(t.shape) for t in m.trainable),
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
    """Expected peak resident memory of ``fleetune train``, in MB (10^6 bytes), and GFLOP of one forward.

    Raises:
        ConfigError: the artifact holds whole models, whose memory is not known.
    """
    memory = RECOMPUTE if recompute else SAVE_ALL
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    every_layer = range(artifact.manifest.num_layers)
    found = footprint(artifact, plan, memory=memory, also_read=every_layer, **sizes)
    return Estimate(
        plan=name,
        active_layers=len(active_layers(plan)),
        recompute=recompute,
        saved_mb=round(found.saved / 1e6, 1),
        weights_mb=round(found.weights / 1e6, 1),
        peak_mb=round((found.peak + COMMAND_BYTES) / 1e6, 1),
        forward_gflop=round(forward_flop(artifact, plan, **sizes) / 1e9, 3),
        **sizes,
    )


def _graph_sizes(m: Manifest) -> Iterable[GraphSize]:
    sections: tuple[Section | Kind, ...] = (m.prelude, *m.kinds, m.head)
    for section in sections:
        for graph in section.graphs.values():
            size = m.files[graph.file].size_bytes
            yield GraphSize(
                file=graph.file, size_bytes=size, inputs=len(graph.inputs), outputs=len(graph.outputs)
            )
