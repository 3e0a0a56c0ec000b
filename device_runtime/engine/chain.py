"""Prelude, blocks and head, chained there and back on rows that run together, along a route through the layers.

Shapes: B rows, S tokens, H width of the hidden stream, C classes. A model without tokens has its own axes in the place of S.

Source of layer dropping: DropPEFT, arXiv 2503.10217. A dropped layer is the identity: its graphs are not run,
its weights not read.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from threading import Lock
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Floats, Indices
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import LOGITS_BYTES, Graph, Layer, Role
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, Route, frozen, route
from fleetune.device_runtime.contracts.texts_apart import MASK, SQUARE, holds_apart
from fleetune.device_runtime.engine.batches import StepResult, pick
from fleetune.device_runtime.engine.decoding import Remembering
from fleetune.device_runtime.engine.gates import Gates, some_rows
from fleetune.device_runtime.engine.hidden_cache import HiddenRows
from fleetune.device_runtime.engine.loaders import Loader, OpenGraph, Value
from fleetune.device_runtime.engine.pulls import pulls_of
from fleetune.device_runtime.engine.texts_apart import Numbers, are_packed, places_of, shut
from fleetune.device_runtime.engine.token_head import HeadResult, run_tokens
from fleetune.device_runtime.engine.weighted_head import run_weighted
from fleetune.device_runtime.engine.weights import OUTSIDE, StepWeights, stays_through_head
from fleetune.device_runtime.errors import ConfigError

Scope = dict[tuple[Role, int], Value]


class Kept(NamedTuple):
    """What the way back needs of one layer: its input (B, S, H) and sides, and its activations if it saves them."""

    layer: int
    values: Scope
    rows: Indices | None
    """Which rows went through it; None for all."""


class _Pass(NamedTuple):
    """Some rows on their way: ``scope`` holds the batch, the side inputs and the hidden stream (B, S, H) as it stands."""

    scope: Scope
    route: Route
    weights: StepWeights
    gates: Gates | None = None


class Chain:
    """The graphs of an artifact, opened one way; several threads may run it at once where its graphs allow that."""

    def __init__(
        self, artifact: Artifact, loader: Loader, *, threads: int, logits_bytes: int = LOGITS_BYTES
    ) -> None:
        """Prepare; graphs are opened when first needed.

        Args:
            artifact: an opened artifact.
            loader: opens its graphs and holds the values that go into them.
            threads: that share the work of each operator.
            logits_bytes: of one chunk, where the head works in chunks.
        """
        self._artifact, self._manifest = artifact, artifact.manifest
        self._loader, self._threads, self._logits_bytes = loader, threads, logits_bytes
        self._holds_apart = holds_apart(artifact.manifest)
        self._last_stays = stays_through_head(artifact.manifest)
        self._graphs: dict[str, OpenGraph] = {}
        self._opening = Lock()

    @property
    def opened(self) -> frozenset[str]:
        """The graph files opened so far, as the manifest names them."""
        return frozenset(self._graphs)

    def close(self) -> None:
        """Let go of the graphs."""
        self._graphs.clear()

    def decode(self, weights: StepWeights, plan: LayerPlan | None = None) -> Remembering:
        """Begin texts that grow token by token, each new one after keys and values of those before."""
        return Remembering(
            self._manifest,
            self._loader,
            lambda graph, grows: self._graph(graph.file, grows=grows),
            weights,
            plan=plan,
        )

    def step(
        self,
        batch: Arrays,
        way: Route,
        weights: StepWeights,
        *,
        keep_logits: bool,
        hidden: HiddenRows | None,
        gates: Gates | None = None,
        class_weights: Floats | None = None,
    ) -> StepResult:
        """Forward and backward on rows that run together; ``hidden`` keeps what flows over the route's boundary."""
        rows = _Pass(self._values(batch), way, weights, gates)
        self._enter(rows)
        if hidden is None:
            tape = self._rise(rows, way.layers)
        else:
            self._skip(rows, batch, hidden)
            tape = self._rise(rows, way.above)
        end = self._run_head(rows, backward=bool(tape), keep_logits=keep_logits, class_weights=class_weights)
        grads = dict(end.grads)
        pulls = pulls_of(
            end.logits,
            batch[self._manifest.label_name],
            end.d_hidden,
            problem_type=self._manifest.problem_type,
            weights=class_weights,
        )
        if end.d_hidden is not None:
            self._descend(rows, tape, self._loader.value_of(end.d_hidden), grads)
        return StepResult(end.loss, end.logits, grads, pulls)

    def evaluate(self, batch: Arrays, weights: StepWeights) -> HeadResult:
        """Loss and answers at full depth."""
        return self._run_head(self._climbed(batch, weights), backward=False, keep_logits=False)

    def predict(
        self,
        batch: Arrays,
        weights: StepWeights,
        choose: Callable[[Array], Array],
        *,
        plan: LayerPlan | None = None,
    ) -> Array:
        """Logits of what ``choose`` picks of the hidden stream (B, S, H); at full depth, but for what ``plan`` drops."""
        scope = self._climbed(batch, weights, plan).scope
        scope["hidden", 0] = self._value(choose(self._loader.array_of(scope["hidden", 0])))
        return self._logits(batch, scope, weights)

    def features(
        self,
        batch: Arrays,
        way: Route,
        weights: StepWeights,
        heads: Sequence[StepWeights],
        *,
        hidden: HiddenRows | None,
    ) -> Array:
        """The logits (B, C) of each of ``heads``, side by side, after one way up; ``hidden`` keeps what crosses the boundary."""
        rows = _Pass(self._values(batch), way, weights)
        self._enter(rows)
        self._rise(rows, way.below)
        if hidden is not None:
            _keep(hidden, self._loader.array_of(rows.scope["hidden", 0]))
        self._rise(rows, way.above)
        return np.concatenate([self._logits(batch, rows.scope, head) for head in heads], axis=-1)

    def _logits(self, batch: Arrays, scope: Scope, weights: StepWeights) -> Array:
        """What the head says of the hidden stream in ``scope``: (B, C) or (B, S, C)."""
        head = self._manifest.head
        graph = head.graphs["predict"]
        if self._labels in {(port.role, port.index) for port in graph.inputs}:
            scope[self._labels] = self._value(self._blank_labels(batch))
        ends = self._run(graph, {**scope, **weights.of(head.tensors, graph)})
        return self._loader.array_of(ends["logits", 0])

    def _blank_labels(self, batch: Arrays) -> Array:
        """Zeros in the place of labels: graphs of 0.1.0 ask them for their size, though for nothing else."""
        sizes: dict[str, int] = {}
        for row in self._manifest.features:
            row.fits(batch[row.name], sizes)
        labels = self._manifest.inputs[self._manifest.label_index]
        return np.zeros([sizes[n] if isinstance(n, str) else n for n in labels.shape], labels.dtype)

    def _climbed(self, batch: Arrays, weights: StepWeights, plan: LayerPlan | None = None) -> _Pass:
        """Prelude and every layer, frozen, but for those that ``plan`` drops."""
        plan = plan or frozen(self._manifest.num_layers)
        still = tuple(Mode.DROP if mode is Mode.DROP else Mode.FORWARD for mode in plan)
        rows = _Pass(self._values(batch), route(still), weights)
        self._enter(rows)
        self._rise(rows, rows.route.layers)
        return rows

    def _enter(self, rows: _Pass) -> None:
        """The prelude: (B, S) ids or whatever a batch holds -> the hidden stream (B, S, H) and the side inputs."""
        prelude = self._manifest.prelude
        graph = prelude.graphs["forward"]
        numbers = self._numbered(rows.scope)
        with rows.weights.in_use(OUTSIDE):
            slots = rows.weights.of(prelude.tensors, graph)
            found = self._run(graph, {**rows.scope, **slots})
            if numbers is not None:
                found["hidden", 0] = self._hidden_apart(rows.scope, graph, slots, numbers)
        rows.scope.update(found)
        if numbers is not None:
            self._shut(rows.scope, graph, numbers)

    def _numbered(self, scope: Scope) -> Numbers | None:
        """Which text each token is of, if a sequence has several; the mask in ``scope`` then says text or padding alone."""
        place = next((i for i, row in enumerate(self._manifest.inputs) if row.name == MASK), None)
        if place is None:
            return None
        numbers: Numbers = self._loader.array_of(scope["batch", place]).astype(np.int64, copy=False)
        if not are_packed(numbers):
            return None
        if not self._holds_apart:
            raise ConfigError(f"{MASK}: more than 0 and 1, and this artifact's graphs hold no texts apart")
        scope["batch", place] = self._value((numbers > 0).astype(np.int64))
        return numbers

    def _hidden_apart(self, scope: Scope, graph: Graph, slots: Scope, numbers: Numbers) -> Value:
        """The hidden stream (B, S, H) that the prelude gives, each text as a sequence of its own."""
        rows, columns, is_token = places_of(numbers)
        alone = dict(scope)
        for i, row in enumerate(self._manifest.inputs):
            if row.shape == ("batch", "seq") and ("batch", i) in scope:
                given = self._loader.array_of(scope["batch", i])[rows, columns]
                alone["batch", i] = self._value(np.where(is_token, given, row.pad).astype(given.dtype))
        found = self._loader.array_of(self._run(graph, {**alone, **slots})["hidden", 0])  # (T, L, H)
        hidden = np.zeros((*numbers.shape, found.shape[-1]), found.dtype)
        hidden[rows[is_token], columns[is_token]] = found[is_token]
        return self._value(hidden)

    def _shut(self, scope: Scope, graph: Graph, numbers: Numbers) -> None:
        """Shut every attention mask between texts."""
        for port in graph.outputs:
            if port.role == "side" and port.shape == SQUARE:
                mask = self._loader.array_of(scope["side", port.index])
                scope["side", port.index] = self._value(shut(mask, numbers))

    def _skip(self, rows: _Pass, batch: Arrays, stored: HiddenRows) -> None:
        """Take the hidden stream to the boundary: from what is stored, by the layers below for the other rows."""
        hidden, missing = stored.load(self._loader.array_of(rows.scope["hidden", 0]).shape)  # (B, S, H), (B,)
        if missing.any():
            fresh = rows._replace(scope=self._values(pick(batch, self._manifest.inputs, missing)))
            self._enter(fresh)
            self._rise(fresh, rows.route.below)
            hidden[missing] = stored.store(missing, self._loader.array_of(fresh.scope["hidden", 0]))
        rows.scope["hidden", 0] = self._value(hidden)

    def _rise(self, rows: _Pass, layers: Sequence[int]) -> list[Kept]:
        """Take the hidden stream (B, S, H) through ``layers``; return what the way back needs, lowest first."""
        tape: list[Kept] = []
        for index, then in zip_longest(layers, layers[1:]):
            layer = self._manifest.layers[index]
            some = None if rows.gates is None else some_rows(rows.gates[index])
            whole = rows.scope.pop(("hidden", 0))
            given: Scope = {
                ("hidden", 0): self._picked(whole, some),
                **{("side", i): self._side(rows.scope, layer, i, some) for i in range(len(layer.sides))},
            }
            purpose = "forward_save" if index in rows.route.saved else "forward"
            graph = self._manifest.kinds[layer.kind].graphs[purpose]
            slots = rows.weights.of(layer.tensors, graph, bare=index in rows.route.bare)
            returns = index >= rows.route.lowest and index not in rows.route.around
            with rows.weights.in_use(index, then=then, stays=returns and then is None and self._last_stays):
                found = self._run(graph, {**given, **slots})
            rows.scope["hidden", 0] = self._merged(whole, found.pop(("hidden", 0)), some)
            if returns:
                tape.append(Kept(index, {**given, **found}, some))
        return tape

    def _descend(self, rows: _Pass, tape: list[Kept], gradient: Value, grads: Arrays) -> None:
        """Take the gradient (B, S, H) down the tape, adding to ``grads``; a layer's values are let go as soon as it is done."""
        while tape:
            index, kept, some = tape.pop()
            layer = self._manifest.layers[index]
            purpose = "backward" if tape else "backward_lowest"
            purpose += "" if index in rows.route.saved else "_recompute"
            graph = self._manifest.kinds[layer.kind].graphs[purpose]
            slots = rows.weights.of(layer.tensors, graph, bare=index in rows.route.bare)
            given = {**kept, ("d_hidden", 0): self._picked(gradient, some), **slots}
            with rows.weights.in_use(index, then=tape[-1].layer if tape else None):
                found = self._run(graph, given)
            if tape:
                gradient = self._merged(gradient, found["d_hidden", 0], some)
            if index in rows.route.trained:
                for name, grad in self._gradients(found, layer.tensors).items():
                    grads[name] = np.add(grads[name], grad) if name in grads else grad

    def _side(self, scope: Scope, layer: Layer, slot: int, rows: Indices | None) -> Value:
        """A side input of a layer, of some rows if it has rows."""
        value = scope["side", layer.sides[slot]]
        if rows is None:
            return value
        ports = self._manifest.kinds[layer.kind].graphs["forward"].inputs
        shape = next((port.shape for port in ports if (port.role, port.index) == ("side", slot)), ())
        return self._picked(value, rows) if shape[:1] == ("batch",) else value

    def _picked(self, value: Value, rows: Indices | None) -> Value:
        """Some rows of a value (B, …); None for all."""
        return value if rows is None else self._value(self._loader.array_of(value)[rows])

    def _merged(self, whole: Value, some: Value, rows: Indices | None) -> Value:
        """``whole`` (B, …) with some of its rows in place of its own."""
        if rows is None:
            return some
        array = self._loader.array_of(whole).copy()
        array[rows] = self._loader.array_of(some)
        return self._value(array)

    def _run_head(
        self, rows: _Pass, *, backward: bool, keep_logits: bool, class_weights: Floats | None = None
    ) -> HeadResult:
        """Loss, answers, the gradient of the hidden stream (B, S, H) and the head's own gradients."""
        head = self._manifest.head
        with rows.weights.in_use(OUTSIDE):
            if class_weights is not None:
                return self._weighted_head(rows, class_weights, backward=backward)
            if head.targets is None:
                return self._whole_head(rows, backward=backward)
            return run_tokens(
                lambda some, targets: self._some_tokens(some, targets, rows.weights),
                self._loader.array_of(rows.scope.pop(("hidden", 0))),
                self._loader.array_of(rows.scope[self._labels]),
                targets=head.targets,
                num_classes=self._manifest.num_logits,
                keep_logits=keep_logits,
                backward=backward,
                logits_bytes=self._logits_bytes,
            )

    def _weighted_head(self, rows: _Pass, weights: Floats, *, backward: bool) -> HeadResult:
        counted = self._manifest.counted
        if counted is None or self._manifest.head.targets:
            raise ConfigError("class weights: this artifact's loss is no mean over labels of classes")

        def run(labels: Array) -> HeadResult:
            scope: Scope = {**rows.scope, self._labels: self._value(labels)}
            return self._whole_head(rows._replace(scope=scope), backward=backward)

        found = run_weighted(run, self._loader.array_of(rows.scope[self._labels]), weights, counted)
        del rows.scope["hidden", 0]
        return found

    def _whole_head(self, rows: _Pass, *, backward: bool) -> HeadResult:
        head = self._manifest.head
        graph = head.graphs["train"]
        ends = self._run(graph, {**rows.scope, **rows.weights.of(head.tensors, graph)})
        del rows.scope["hidden", 0]
        logits = self._loader.array_of(ends["logits", 0])  # (B, C) or (B, S, C)
        return HeadResult(
            float(self._loader.array_of(ends["loss", 0])),
            logits if self._manifest.problem_type else logits.argmax(-1),
            logits,
            self._loader.array_of(ends["d_hidden", 0]) if backward else None,
            self._gradients(ends, head.tensors),
        )

    def _some_tokens(self, hidden: Array, targets: Array, weights: StepWeights) -> tuple[float, Arrays]:
        """The head on tokens (1, T, H) and (1, T): the sum of their losses, and logits, d_hidden and gradients by name."""
        head = self._manifest.head
        graph = head.graphs["train"]
        scope: Scope = {("hidden", 0): self._value(hidden), self._labels: self._value(targets)}
        ends = self._run(graph, {**scope, **weights.of(head.tensors, graph)})
        found = {role: self._loader.array_of(ends[role, 0]) for role in ("logits", "d_hidden")}
        return float(self._loader.array_of(ends["loss", 0])), {**found, **self._gradients(ends, head.tensors)}

    def _gradients(self, results: Scope, slots: Sequence[int]) -> Arrays:
        """A section's weight gradients by tensor name."""
        rows = self._manifest.tensors
        found = (
            (rows[slots[slot]].name, value) for (role, slot), value in results.items() if role == "d_weight"
        )
        return {name: np.asarray(self._loader.array_of(value), np.float32) for name, value in found}

    @property
    def _labels(self) -> tuple[Role, int]:
        return "batch", self._manifest.label_index

    def _values(self, batch: Arrays) -> Scope:
        rows = enumerate(self._manifest.inputs)
        return {("batch", i): self._value(batch[row.name]) for i, row in rows if row.name in batch}

    def _value(self, array: Array) -> Value:
        return self._loader.value_of(np.ascontiguousarray(array))

    def _run(self, graph: Graph, scope: Mapping[tuple[Role, int], Value]) -> Scope:
        feeds = {port.name: scope[port.role, port.index] for port in graph.inputs}
        values = self._graph(graph.file).run(feeds, [port.name for port in graph.outputs])
        return {(port.role, port.index): value for port, value in zip(graph.outputs, values, strict=True)}

    def _graph(self, file: str, *, grows: bool = False) -> OpenGraph:
        opener = (self._loader.open_growing if grows else None) or self._loader.open
        with self._opening:
            if file not in self._graphs:
                self._graphs[file] = opener(self._artifact.folder / file, self._threads)
            return self._graphs[file]


def _keep(stored: HiddenRows, hidden: Array) -> None:
    """Store the rows of ``hidden`` (B, S, H) that are not there."""
    _, missing = stored.load(hidden.shape)
    if missing.any():
        stored.store(missing, hidden[missing])
