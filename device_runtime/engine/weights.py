"""The weight slots of sections: frozen ones from the mapped file, trainable ones from the adapter of a step.

Streaming is the sliding window of TPI-LLM (arXiv 2410.00531) turned to training: both ways through the layers, the next one's
weights are read ahead while a layer runs, and leave resident memory when it has run. The file stays mapped: nothing is copied.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import Graph, Manifest, Role
from fleetune.device_runtime.contracts.plans import Route
from fleetune.device_runtime.engine.loaders import Value
from fleetune.device_runtime.errors import ArtifactError, ConfigError

Span = tuple[int, int]
"""First byte and the byte after the last, in the weights file."""
OUTSIDE = -1
"""In the place of a layer: the prelude and the head."""


class FrozenWeights:
    """Frozen tensors as a backend holds them; mapped, not copied, and read only when a graph runs on them."""

    def __init__(self, artifact: Artifact, hold: Callable[[Array], Value]) -> None:
        """``hold`` wraps an array without copying it."""
        self._artifact, self._hold = artifact, hold
        self._values: dict[int, Value] = {}
        self._spans = _spans(artifact)
        self._users: Counter[int] = Counter()
        self._counting = Lock()
        self._is_scattered = False

    def of_step(self, adapter: Arrays, *, streamed: bool) -> "StepWeights":
        """The weights of one step; ``adapter``: every trainable tensor by name, float32."""
        if streamed and not self._is_scattered:
            self._is_scattered = True
            for start, end in _tables(self._artifact):
                self._artifact.scatter(start, end)
        return StepWeights(self, self._artifact, self._hold, adapter, streamed=streamed)

    def value(self, index: int) -> Value:
        """The tensor in that row of the manifest's table."""
        if index not in self._values:
            row = self._artifact.manifest.tensors[index]
            self._values[index] = self._hold(self._artifact.base(row))
        return self._values[index]

    @contextmanager
    def streaming(self, layer: int, *, then: int | None = None, stays: bool = False) -> Iterator[None]:
        """Around a graph that runs on the layer's weights; several threads may be in it at once.

        Args:
            layer: whose weights leave resident memory when the last thread is through; whoever needs them again reads them again.
            then: the layer that comes next; its weights are read ahead, which nobody waits for.
            stays: the layer itself comes next.
        """
        with self._counting:
            self._users[layer] += 1
            is_first = self._users[layer] == 1
        if is_first and then is not None:
            self._advise(self._artifact.fetch, then)
        try:
            yield
        finally:
            with self._counting:
                self._users[layer] -= 1
                is_last = not self._users[layer]
            if is_last and not stays:
                self._advise(self._artifact.release, layer)

    def _advise(self, advise: Callable[[int, int], None], layer: int) -> None:
        for span in self._spans.get(layer, ()):
            advise(*span)

    def close(self) -> None:
        """Let go of every tensor."""
        self._values.clear()


class StepWeights:
    """The slots of one step."""

    def __init__(
        self,
        frozen: FrozenWeights,
        artifact: Artifact,
        hold: Callable[[Array], Value],
        adapter: Arrays,
        *,
        streamed: bool,
    ) -> None:
        """``adapter``: every trainable tensor by name, float32; ``streamed``: a layer's frozen weights leave when it has run."""
        self._frozen, self._hold, self._adapter = frozen, hold, adapter
        self._rows, self._streamed = artifact.manifest.tensors, streamed

    def in_use(
        self, layer: int, *, then: int | None = None, stays: bool = False
    ) -> AbstractContextManager[None]:
        """Around a graph that runs on the layer's weights; arguments as of :meth:`FrozenWeights.streaming`."""
        return self._frozen.streaming(layer, then=then, stays=stays) if self._streamed else nullcontext()

    def of(self, slots: Sequence[int], graph: Graph, *, bare: bool = False) -> dict[tuple[Role, int], Value]:
        """What ``graph`` wants of the section or layer whose slots are given; ``bare``: every B of its LoRA is zeros.

        Raises:
            ArtifactError: an adapter tensor is missing, or has another shape or dtype.
        """
        wanted = [port.index for port in graph.inputs if port.role == "weight"]
        return {("weight", slot): self._value(slots[slot], bare=bare) for slot in wanted}

    def _value(self, index: int, *, bare: bool) -> Value:
        row = self._rows[index]
        if not row.trainable:
            return self._frozen.value(index)
        array = self._adapter.get(row.name)
        if array is None or array.shape != row.shape or array.dtype != np.dtype(row.dtype):
            got = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise ArtifactError(
                f"adapter tensor {row.name}: expected {row.dtype}{list(row.shape)}, got {got}"
            )
        return self._hold(np.zeros_like(array) if bare and is_lora_b(row.name) else array)


def is_lora_b(name: str) -> bool:
    """Whether PEFT gives this name to a second factor: at zero its pair adds nothing."""
    return ".lora_B" in name or ".lora_embedding_B" in name


def stays_through_head(m: Manifest) -> bool:
    """Whether the topmost layer's weights, the first on the way back, stay while the head runs: if the head's are fewer."""
    head, layer = (
        sum(m.tensors[i].size_bytes for i in dict.fromkeys(slots) if not m.tensors[i].trainable)
        for slots in (m.head.tensors, m.layers[-1].tensors)
    )
    return head < layer


def check_bare(way: Route, manifest: Manifest) -> None:
    """Raise ConfigError where a layer is to run without a LoRA that it does not have."""
    for layer in sorted(way.bare):
        if not any(is_lora_b(manifest.tensors[i].name) for i in manifest.layers[layer].tensors):
            raise ConfigError(f"layer {layer} has no LoRA to switch off; drop or freeze it")


def _tables(artifact: Artifact) -> list[Span]:
    """What only the prelude reads: embedding tables, a row here and a row there."""
    m = artifact.manifest
    used = {*m.head.tensors, *(i for layer in m.layers for i in layer.tensors)}
    rows = [m.tensors[i] for i in m.prelude.tensors if i not in used]
    return [(row.offset, row.offset + row.size_bytes) for row in rows if not row.trainable]


def _spans(artifact: Artifact) -> dict[int, list[Span]]:
    """Where each layer's own frozen tensors lie; tensors that touch make one span."""
    found: dict[int, list[Span]] = {}
    rows = [row for row in artifact.manifest.tensors if not row.trainable]
    for row in sorted(rows, key=lambda row: row.offset):
        spans = found.setdefault(row.layer, [])
        end = row.offset + row.size_bytes
        if spans and row.offset - spans[-1][1] < _PAGE:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((row.offset, end))
    return found


_PAGE = 4096
