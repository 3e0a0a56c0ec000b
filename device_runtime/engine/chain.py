"""Prelude, blocks and head, chained there and back on rows that run together, following a layer plan.

Source of layer dropping: DropPEFT, arXiv 2503.10217. A dropped layer is the identity: its graphs are not run,
its weights not read.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import LOGITS_BYTES, Graph, Role, Section
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, active_layers, lowest_trained
from fleetune.device_runtime.engine.batches import StepResult, pick
from fleetune.device_runtime.engine.hidden_cache import PrefixRows
from fleetune.device_runtime.engine.loaders import Loader, OpenGraph, Value
from fleetune.device_runtime.engine.token_head import HeadResult, run_tokens
from fleetune.device_runtime.engine.weights import OUTSIDE, FrozenWeights, StepWeights

Scope = dict[tuple[Role, int], Value]


class Kept(NamedTuple):
    """What the way back needs of one layer; ``saved`` says whether its activations are among the values."""

    layer: int
    saved: bool
    values: Scope


class Chain:
    """The graphs of an artifact, opened one way; several threads may run it at once where its graphs allow that."""

    def __init__(
        self,
        artifact: Artifact,
        loader: Loader,
        open_graph: Callable[[Path], OpenGraph],
        *,
        frozen: FrozenWeights,
    ) -> None:
        """Prepare; graphs are opened when first needed.

        Args:
            artifact: an opened artifact.
            loader: holds the values that go into the graphs.
            open_graph: opens a graph file; one of the loader's ways.
            frozen: the weights that the loader holds.
        """
        self.memory = SAVE_ALL
        self.logits_bytes = LOGITS_BYTES
        """Of one chunk, where the head works in chunks."""
        self._artifact, self._manifest = artifact, artifact.manifest
        self._loader, self._open, self._frozen = loader, open_graph, frozen
        self._graphs: dict[str, OpenGraph] = {}
        self._opening = Lock()

    @property
    def opened(self) -> frozenset[str]:
        """The graph files opened so far, as the manifest names them."""
        return frozenset(self._graphs)

    def close(self) -> None:
        """Let go of the graphs."""
        self._graphs.clear()

    def step(
        self,
        batch: Arrays,
        plan: LayerPlan,
        weights: StepWeights,
        *,
        keep_logits: bool,
        prefix: PrefixRows | None,
    ) -> StepResult:
        """Forward and backward on rows that run together; arguments as of ``Stack.step``."""
        lowest = lowest_trained(plan)
        scope = self._values(batch)
        if prefix is None or not 0 < lowest < len(plan):
            tape = self._climb(scope, plan, weights)
        else:
            tape = self._climb_from_prefix(scope, batch, plan, weights, prefix)
        end = self._run_head(scope, weights, backward=lowest < len(plan), keep_logits=keep_logits)
        grads = dict(end.grads)
        gradient = None if end.d_hidden is None else self._loader.value_of(end.d_hidden)
        self._descend(tape, gradient, plan, weights, grads)
        return StepResult(end.loss, end.logits, grads)

    def evaluate(self, batch: Arrays, weights: StepWeights) -> HeadResult:
        """Loss and likeliest classes at full depth."""
        scope = self._values(batch)
        self._climb(scope, self._frozen_plan(), weights)
        return self._run_head(scope, weights, backward=False, keep_logits=False)

    def predict(self, batch: Arrays, weights: StepWeights, choose: Callable[[Array], Array]) -> Array:
        """Logits at full depth of what ``choose`` picks of the hidden stream."""
        scope = self._values(batch)
        self._climb(scope, self._frozen_plan(), weights)
        scope["hidden", 0] = self._value(choose(self._loader.array_of(scope["hidden", 0])))
        head = self._manifest.head
        graph = head.graphs["predict"]
        ends = self._run(graph, {**scope, **weights.of(head.tensors, graph)})
        return self._loader.array_of(ends["logits", 0])

    def _climb(self, scope: Scope, plan: LayerPlan, weights: StepWeights) -> list[Kept]:
        """Prelude and all active layers."""
        self._enter(scope, weights)
        return self._rise(scope, plan, weights, active_layers(plan))

    def _climb_from_prefix(
        self, scope: Scope, batch: Arrays, plan: LayerPlan, weights: StepWeights, prefix: PrefixRows
    ) -> list[Kept]:
        """The same, with the layers below the lowest trained one run only on rows that ``prefix`` lacks."""
        lowest = lowest_trained(plan)
        self._enter(scope, weights)
        hidden, missing = prefix.load(self._loader.array_of(scope["hidden", 0]).shape)
        if missing.any():
            below = self._values(pick(batch, self._manifest.inputs, missing))
            self._enter(below, weights)
            self._rise(below, plan, weights, [i for i in active_layers(plan) if i < lowest])
            hidden[missing] = prefix.store(missing, self._loader.array_of(below["hidden", 0]))
        scope["hidden", 0] = self._value(hidden)
        return self._rise(scope, plan, weights, [i for i in active_layers(plan) if i >= lowest])

    def _enter(self, scope: Scope, weights: StepWeights) -> None:
        """The prelude: put the hidden stream and the side inputs into ``scope``."""
        prelude = self._manifest.prelude
        graph = prelude.graphs["forward"]
        with self._frozen.in_use(OUTSIDE):
            scope.update(self._run(graph, {**scope, **weights.of(prelude.tensors, graph)}))

    def _rise(self, scope: Scope, plan: LayerPlan, weights: StepWeights, layers: Sequence[int]) -> list[Kept]:
        """Take the hidden stream in ``scope`` through ``layers``; return what the way back needs, lowest first."""
        manifest, lowest = self._manifest, lowest_trained(plan)
        tape: list[Kept] = []
        for place, index in enumerate(layers):
            layer, then = manifest.layers[index], next(iter(layers[place + 1 :]), None)
            kept: Scope = {
                ("hidden", 0): scope.pop(("hidden", 0)),
                **{("side", i): scope["side", s] for i, s in enumerate(layer.sides)},
            }
            saving = index >= lowest and self.memory.saves(len(layers) - 1 - place)
            graph = manifest.kinds[layer.kind].graphs["forward_save" if saving else "forward"]
            with self._frozen.in_use(index, then=then, stays=index >= lowest and then is None):
                results = self._run(graph, {**kept, **weights.of(layer.tensors, graph)})
            scope["hidden", 0] = results.pop(("hidden", 0))
            if index >= lowest:
                tape.append(Kept(index, saving, {**kept, **results}))
        return tape

    def _descend(
        self, tape: list[Kept], gradient: Value, plan: LayerPlan, weights: StepWeights, grads: Arrays
    ) -> None:
        """Walk the tape down; each layer's saved values are let go as soon as it is done."""
        manifest = self._manifest
        while tape:
            index, saved, values = tape.pop()
            layer = manifest.layers[index]
            purpose = ("backward" if tape else "backward_lowest") + ("" if saved else "_recompute")
            graph = manifest.kinds[layer.kind].graphs[purpose]
            with self._frozen.in_use(index, then=tape[-1].layer if tape else None):
                results = self._run(
                    graph, {**values, ("d_hidden", 0): gradient, **weights.of(layer.tensors, graph)}
                )
            gradient = results.get(("d_hidden", 0))
            if plan[index] is Mode.TRAIN:
                found = self._gradients(results, layer.tensors)
                grads.update({n: np.add(grads[n], g) if n in grads else g for n, g in found.items()})

    def _run_head(
        self, scope: Scope, weights: StepWeights, *, backward: bool, keep_logits: bool
    ) -> HeadResult:
        """Loss, answers, the gradient of the hidden stream and the head's own gradients."""
        head = self._manifest.head
        with self._frozen.in_use(OUTSIDE):
            if head.targets is None:
                return self._whole_head(scope, weights, backward=backward)
            return run_tokens(
                lambda rows, targets: self._some_tokens(rows, targets, weights),
                self._loader.array_of(scope.pop(("hidden", 0))),
                self._loader.array_of(scope[self._labels()]),
                targets=head.targets,
                num_classes=_num_classes(head),
                keep_logits=keep_logits,
                backward=backward,
                logits_bytes=self.logits_bytes,
            )

    def _whole_head(self, scope: Scope, weights: StepWeights, *, backward: bool) -> HeadResult:
        head = self._manifest.head
        ends = self._run(head.graphs["train"], {**scope, **weights.of(head.tensors, head.graphs["train"])})
        del scope["hidden", 0]
        logits, grads = self._loader.array_of(ends["logits", 0]), self._gradients(ends, head.tensors)
        gradient = self._loader.array_of(ends["d_hidden", 0]) if backward else None
        return HeadResult(
            float(self._loader.array_of(ends["loss", 0])), logits.argmax(-1), logits, gradient, grads
        )

    def _some_tokens(self, rows: Array, targets: Array, weights: StepWeights) -> tuple[float, Arrays]:
        """The head on tokens (1, rows): the sum of their losses, and logits, d_hidden and gradients by name."""
        head = self._manifest.head
        graph = head.graphs["train"]
        scope: Scope = {("hidden", 0): self._value(rows), self._labels(): self._value(targets)}
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

    def _frozen_plan(self) -> LayerPlan:
        return (Mode.FORWARD,) * self._manifest.num_layers

    def _labels(self) -> tuple[Role, int]:
        names = [row.name for row in self._manifest.inputs]
        return "batch", names.index("labels")

    def _values(self, batch: Arrays) -> Scope:
        rows = enumerate(self._manifest.inputs)
        return {("batch", i): self._value(batch[row.name]) for i, row in rows if row.name in batch}

    def _value(self, array: Array) -> Value:
        return self._loader.value_of(np.ascontiguousarray(array))

    def _run(self, graph: Graph, scope: Mapping[tuple[Role, int], Value]) -> Scope:
        feeds = {port.name: scope[port.role, port.index] for port in graph.inputs}
        values = self._graph(graph.file).run(feeds, [port.name for port in graph.outputs])
        return {(port.role, port.index): value for port, value in zip(graph.outputs, values, strict=True)}

    def _graph(self, file: str) -> OpenGraph:
        with self._opening:
            if file not in self._graphs:
                self._graphs[file] = self._open(self._artifact.folder / file)
            return self._graphs[file]


def _num_classes(head: Section) -> int:
    """The last dimension of the logits."""
    return next(int(port.shape[-1]) for port in head.graphs["train"].outputs if port.role == "logits")
