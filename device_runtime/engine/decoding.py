"""Text token by token: what a language model says after the tokens so far, with or without a memory of them.

With the graphs ``step`` and ``forward_step`` only new tokens run, and each block gives back keys and values of all tokens, which
go into it with the next ones. Artifacts without them, and other backends, run all tokens again.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Indices
from fleetune.device_runtime.contracts.manifest import (
    FORWARD_STEP,
    STEP,
    Graph,
    Manifest,
    Port,
    Role,
)
from fleetune.device_runtime.contracts.plans import LayerPlan, active_layers, frozen
from fleetune.device_runtime.engine.batches import check_batch
from fleetune.device_runtime.engine.loaders import Loader, OpenGraph, Value
from fleetune.device_runtime.engine.weights import OUTSIDE, StepWeights
from fleetune.device_runtime.errors import ArtifactError, ConfigError

IDS, MASK = "input_ids", "attention_mask"
_Place = tuple[Role, int]
_Opened = Callable[[Graph, bool], OpenGraph]
_WIDER = 32
"""All tokens are run with padding up to a multiple of this: every size that is met is memory that onnxruntime keeps."""


class Decoding(Protocol):
    """Texts that grow, a row each; not for several threads at once."""

    @property
    def remembers(self) -> bool:
        """Whether a new token costs one token, however many were before."""

    def feed(self, ids: Indices, mask: Indices | None = None) -> Array:
        """Take the next tokens, and say what comes after the last of them.

        Args:
            ids: (batch, new tokens), int64, one at least.
            mask: (batch, tokens so far and new ones), int64, zero for padding; None for no padding.

        Returns:
            Logits (batch, vocabulary), float32.

        Raises:
            ArtifactError: more tokens than the model has positions for.
            DataError: an id for which it has no row.
        """


class Ask(Protocol):
    """Logits (batch, vocabulary) of one token in each row; as :meth:`Engine.predict_at`."""

    def __call__(
        self, batch: Arrays, adapter: Arrays, positions: Indices, *, plan: LayerPlan | None = None
    ) -> Array:
        """Run all tokens."""


def check_generates(manifest: Manifest) -> None:
    """Raise ConfigError unless the model says which token comes next."""
    names = {row.name for row in manifest.features}
    if manifest.counted is None or not manifest.counted.shift or not {IDS, MASK} <= names:
        classes = f" of {len(manifest.labels)} classes" if manifest.labels else ""
        raise ConfigError(
            f"the artifact is for {manifest.task}: its head answers with one{classes}, not with the next token; "
            "`fleetune predict` asks it, and `fleetune export --task causal-lm` makes one that writes text"
        )


class Recomputed:
    """Runs all tokens again for each new one."""

    remembers = False

    def __init__(self, manifest: Manifest, ask: Ask, adapter: Arrays, plan: LayerPlan | None = None) -> None:
        self._manifest, self._ask, self._adapter, self._plan = manifest, ask, adapter, plan
        self._ids: Indices | None = None

    def feed(self, ids: Indices, mask: Indices | None = None) -> Array:
        """As :meth:`Decoding.feed`."""
        self._ids = ids if self._ids is None else np.concatenate([self._ids, ids], axis=1)
        count = self._ids.shape[1]
        most = max(count, self._manifest.bounds.get("seq", count + _WIDER))
        more = ((0, 0), (0, min(-count % _WIDER, most - count)))
        seen = np.ones_like(self._ids) if mask is None else mask
        batch = _batch(self._manifest, np.pad(self._ids, more), np.pad(seen, more))
        return self._ask(batch, self._adapter, np.full(len(ids), count - 1), plan=self._plan)


class _Bound(NamedTuple):
    """A graph with the values that stay: its weights by port, and the ports of what changes."""

    graph: OpenGraph
    fixed: dict[str, Value]
    ports: tuple[Port, ...]
    wanted: list[str]

    def run(self, scope: Mapping[_Place, Value]) -> list[Value]:
        if strange := [port.name for port in self.ports if (port.role, port.index) not in scope]:
            raise ArtifactError(f"a step of tokens does not give {', '.join(strange)}; export again")
        feeds = {**self.fixed, **{port.name: scope[port.role, port.index] for port in self.ports}}
        return self.graph.run(feeds, self.wanted)


class Remembering:
    """Runs new tokens alone."""

    remembers = True

    def __init__(
        self,
        manifest: Manifest,
        loader: Loader,
        opened: _Opened,
        weights: StepWeights,
        *,
        plan: LayerPlan | None = None,
    ) -> None:
        """Hold the weights once for all tokens.

        Args:
            manifest: of an artifact whose blocks have ``forward_step``.
            loader: holds the values that go into its graphs.
            opened: opens one of them; told whether its values grow from run to run.
            weights: frozen ones and an adapter's.
            plan: which layers are left out; None for none.
        """
        self._manifest, self._loader, self._weights = manifest, loader, weights
        self._layers = active_layers(plan or frozen(manifest.num_layers))
        self._prelude = self._bound(opened, manifest.prelude.graphs[STEP], manifest.prelude.tensors)
        self._head = self._bound(opened, manifest.head.graphs["predict"], manifest.head.tensors, grows=False)
        self._blocks = [
            self._bound(
                opened,
                manifest.kinds[manifest.layers[i].kind].graphs[FORWARD_STEP],
                manifest.layers[i].tensors,
            )
            for i in self._layers
        ]
        self._pairs: list[dict[_Place, Value]] = []
        self._length = 0

    def feed(self, ids: Indices, mask: Indices | None = None) -> Array:
        """As :meth:`Decoding.feed`."""
        total = self._length + ids.shape[1]
        whole = np.ones((len(ids), total), np.int64) if mask is None else mask
        self._check(ids, total)
        scope = self._entered(_batch(self._manifest, ids, whole))
        pairs = self._pairs or [self._nothing(block, len(ids)) for block in self._blocks]
        found = [self._through(number, scope, pair) for number, pair in enumerate(pairs)]
        self._pairs, self._length = found, total
        return self._said(self._loader.array_of(scope["hidden", 0]))

    def _entered(self, batch: Arrays) -> dict[_Place, Value]:
        """The prelude: hidden stream (B, S, H) of the new tokens, and the sides by their index."""
        rows = enumerate(self._manifest.inputs)
        given: dict[_Place, Value] = {
            ("batch", i): self._value(batch[row.name]) for i, row in rows if row.name in batch
        }
        with self._weights.in_use(OUTSIDE):
            return self._named(self._prelude, given, self._manifest.prelude.graphs[STEP].outputs)

    def _through(
        self, number: int, scope: dict[_Place, Value], pair: dict[_Place, Value]
    ) -> dict[_Place, Value]:
        """One block; ``scope`` gets its output, and what is returned are keys and values of all tokens."""
        index, block = self._layers[number], self._blocks[number]
        layer = self._manifest.layers[index]
        sides: dict[_Place, Value] = {("side", i): scope["side", s] for i, s in enumerate(layer.sides)}
        outputs = self._manifest.kinds[layer.kind].graphs[FORWARD_STEP].outputs
        then = self._layers[number + 1] if number + 1 < len(self._layers) else None
        with self._in_use(index, then):
            found = self._named(block, {("hidden", 0): scope["hidden", 0], **sides, **pair}, outputs)
        scope["hidden", 0] = found.pop(("hidden", 0))
        return found

    def _in_use(self, layer: int, then: int | None) -> AbstractContextManager[None]:
        return self._weights.in_use(layer, then=then)

    def _said(self, hidden: Array) -> Array:
        """The head on the last tokens of (B, S, H): logits (B, V)."""
        last = np.ascontiguousarray(hidden[:, -1][None])
        with self._weights.in_use(OUTSIDE):
            (value,) = self._head.run({("hidden", 0): self._loader.value_of(last)})
        logits: Array = self._loader.array_of(value)[0]
        return logits

    def _nothing(self, block: _Bound, rows: int) -> dict[_Place, Value]:
        """Keys and values of no tokens."""
        ports = [port for port in block.ports if port.role == "saved"]
        return {
            (port.role, port.index): self._value(np.zeros(_empty(port, rows), port.dtype)) for port in ports
        }

    def _bound(self, opened: _Opened, graph: Graph, slots: Sequence[int], *, grows: bool = True) -> _Bound:
        values = self._weights.of(slots, graph)
        fixed = {p.name: values[p.role, p.index] for p in graph.inputs if p.role == "weight"}
        moving = tuple(p for p in graph.inputs if p.role != "weight")
        return _Bound(opened(graph, grows), fixed, moving, [p.name for p in graph.outputs])

    def _named(
        self, bound: _Bound, given: Mapping[_Place, Value], outputs: Sequence[Port]
    ) -> dict[_Place, Value]:
        return {(p.role, p.index): v for p, v in zip(outputs, bound.run(given), strict=True)}

    def _value(self, array: Array) -> Value:
        return self._loader.value_of(np.ascontiguousarray(array))

    def _check(self, ids: Indices, total: int) -> None:
        names = [row for row in self._manifest.features if row.name == IDS]
        check_batch({IDS: ids}, names, bounds={})
        most = self._manifest.bounds.get("seq", total)
        if total > most:
            check_batch({IDS: np.zeros((1, total), np.int64)}, names, bounds={"seq": most})


def _empty(port: Port, rows: int) -> list[int]:
    """The port's shape (batch, heads, past, width) for so many rows and no token."""
    return [extent if isinstance(extent, int) else rows if extent == "batch" else 0 for extent in port.shape]


def _batch(manifest: Manifest, ids: Indices, mask: Indices) -> Arrays:
    """A model's inputs: what is neither ids nor mask is zeros, as of a text that is no pair."""
    known: Arrays = {IDS: ids, MASK: mask}
    return {row.name: known.get(row.name, np.zeros_like(ids)) for row in manifest.features}
