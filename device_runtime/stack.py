"""Chains prelude, blocks and head there and back, following a layer plan.

Source of layer dropping: DropPEFT, arXiv 2503.10217. A dropped layer is the identity: its graphs are not run,
its weights not read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from device_runtime.arrays import Array, Arrays
from device_runtime.artifact import Artifact
from device_runtime.batches import Mean, StepResult, check_batch, pick, share_of, split
from device_runtime.errors import ConfigError
from device_runtime.loaders import LOADERS, OpenGraph, Value
from device_runtime.manifest import Graph, Role, Section
from device_runtime.memory_plan import SAVE_ALL, MemoryPlan
from device_runtime.plans import LayerPlan, Mode, active_layers, lowest_trained
from device_runtime.prefix import PrefixRows
from device_runtime.token_head import HeadResult, run_tokens
from device_runtime.weights import OUTSIDE, FrozenWeights, StepWeights

Scope = dict[tuple[Role, int], Value]


class Kept(NamedTuple):
    """What the way back needs of one layer; ``saved`` says whether its activations are among the values."""

    layer: int
    saved: bool
    values: Scope


class Stack:
    """An artifact opened for training and prediction; graphs are opened when first needed."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int = 0,
        memory: MemoryPlan = SAVE_ALL,
        provider: str = "cpu",
    ) -> None:
        """Prepare.

        Args:
            artifact: an opened artifact.
            threads: for the kernels, 0 = one per core.
            memory: how rows, activations and frozen weights are held.
            provider: of onnxruntime: ``cpu``, ``cuda``, ``tensorrt`` or ``xnnpack``.

        Raises:
            ConfigError: a number below 0, or a provider that is not there.
        """
        self._engine = LOADERS[artifact.manifest.backend](threads, provider)
        self.artifact = artifact
        self.frozen = FrozenWeights(artifact, self._engine.value_of)
        self.use(memory)
        self._graphs: dict[str, OpenGraph] = {}

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use(self, memory: MemoryPlan) -> None:
        """From the next step on, hold rows, activations and weights like this.

        Raises:
            ConfigError: a number below 0.
        """
        memory.check()
        self.memory = memory
        self.frozen.stream(memory.streamed)

    def close(self) -> None:
        """Let go of graphs and weights."""
        self._graphs.clear()
        self.frozen.close()

    def step(
        self,
        batch: Arrays,
        plan: LayerPlan,
        adapter: Arrays,
        *,
        keep_logits: bool = False,
        prefix: PrefixRows | None = None,
    ) -> StepResult:
        """Run forward and backward once over the active layers; weights are not touched.

        Args:
            batch: arrays by the manifest's input names, ``labels`` included.
            plan: one mode per layer.
            adapter: every trainable tensor by name, float32.
            keep_logits: return them also where they are large (batch x seq x vocabulary).
            prefix: what flows into the lowest trained layer, for rows that were here before; filled for the others.

        Returns:
            Mean loss, logits, and gradients by tensor name, float32, for the trained layers and the head only.

        Raises:
            ArtifactError: a name, dtype or shape differs from the manifest (all differences listed).
            ConfigError: a plan of another length.
        """
        manifest = self.artifact.manifest
        if len(plan) != manifest.num_layers:
            raise ConfigError(f"plan of {len(plan)} layers; the model has {manifest.num_layers}")
        check_batch(batch, manifest.inputs, bounds=manifest.bounds)
        weights, mean = self._step_weights(adapter), Mean(share_of(batch, manifest.head.targets))
        for rows, part in split(batch, manifest.inputs, self.memory.micro_batch):
            given = None if prefix is None else prefix.some(rows)
            made = self._there_and_back(part, plan, weights, keep_logits=keep_logits, prefix=given)
            mean.add(made, share_of(part, manifest.head.targets))
        return mean.result()

    def evaluate(self, batch: Arrays, adapter: Arrays) -> tuple[float, NDArray[np.int64]]:
        """Mean loss and the likeliest class of each answer at full depth; ``batch`` as in :meth:`step`."""
        manifest = self.artifact.manifest
        check_batch(batch, manifest.inputs, bounds=manifest.bounds)
        weights, mean = self._step_weights(adapter), Mean(share_of(batch, manifest.head.targets))
        answers = []
        for _, part in split(batch, manifest.inputs, self.memory.micro_batch):
            scope = self._values(part)
            self._climb(scope, self._frozen_plan(), weights)
            end = self._run_head(scope, weights, backward=False, keep_logits=False)
            mean.add(StepResult(end.loss, None, {}), share_of(part, manifest.head.targets))
            answers.append(end.answers)
        return mean.result().loss, np.concatenate(answers)

    def predict(self, batch: Arrays, adapter: Arrays) -> Array:
        """Logits at full depth; ``batch`` needs no labels."""
        return self._predict(batch, adapter, lambda hidden: hidden)

    def predict_at(self, batch: Arrays, adapter: Arrays, positions: NDArray[np.int64]) -> Array:
        """Logits (batch, vocabulary) of one token in each row, whose places are ``positions`` (batch,).

        Raises:
            ConfigError: the head does not work token by token.
        """
        if self.artifact.manifest.head.targets is None:
            raise ConfigError("this model answers once for a row, not at positions")
        chosen = self._predict(batch, adapter, lambda hidden: hidden[np.arange(len(hidden)), positions][None])
        return np.asarray(chosen[0])

    def _predict(self, batch: Arrays, adapter: Arrays, choose: Callable[[Array], Array]) -> Array:
        manifest, weights = self.artifact.manifest, self._step_weights(adapter)
        given = {name: array for name, array in batch.items() if name != "labels"}
        rows = [row for row in manifest.inputs if row.name != "labels"]
        check_batch(given, rows, bounds=manifest.bounds)
        scope = self._values(given)
        self._climb(scope, self._frozen_plan(), weights)
        scope["hidden", 0] = self._value(choose(self._engine.array_of(scope["hidden", 0])))
        graph = manifest.head.graphs["predict"]
        ends = self._run(graph, {**scope, **weights.of(manifest.head.tensors, graph)})
        return self._engine.array_of(ends["logits", 0])

    def _there_and_back(
        self,
        batch: Arrays,
        plan: LayerPlan,
        weights: StepWeights,
        *,
        keep_logits: bool,
        prefix: PrefixRows | None,
    ) -> StepResult:
        """One step on rows that run together."""
        lowest = lowest_trained(plan)
        scope = self._values(batch)
        if prefix is None or not 0 < lowest < len(plan):
            tape = self._climb(scope, plan, weights)
        else:
            tape = self._climb_from_prefix(scope, batch, plan, weights, prefix)
        end = self._run_head(scope, weights, backward=lowest < len(plan), keep_logits=keep_logits)
        grads = dict(end.grads)
        gradient = None if end.d_hidden is None else self._engine.value_of(end.d_hidden)
        self._descend(tape, gradient, plan, weights, grads)
        return StepResult(end.loss, end.logits, grads)

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
        hidden, missing = prefix.load(self._engine.array_of(scope["hidden", 0]).shape)
        if missing.any():
            inputs = self.artifact.manifest.inputs
            below = self._values(pick(batch, inputs, missing))
            self._enter(below, weights)
            self._rise(below, plan, weights, [i for i in active_layers(plan) if i < lowest])
            hidden[missing] = prefix.store(missing, self._engine.array_of(below["hidden", 0]))
        scope["hidden", 0] = self._value(hidden)
        return self._rise(scope, plan, weights, [i for i in active_layers(plan) if i >= lowest])

    def _enter(self, scope: Scope, weights: StepWeights) -> None:
        """The prelude: put the hidden stream and the side inputs into ``scope``."""
        prelude = self.artifact.manifest.prelude
        graph = prelude.graphs["forward"]
        scope.update(self._run(graph, {**scope, **weights.of(prelude.tensors, graph)}))
        self.frozen.release(OUTSIDE)

    def _rise(self, scope: Scope, plan: LayerPlan, weights: StepWeights, layers: Sequence[int]) -> list[Kept]:
        """Take the hidden stream in ``scope`` through ``layers``; return what the way back needs, lowest first."""
        manifest, lowest = self.artifact.manifest, lowest_trained(plan)
        tape: list[Kept] = []
        for place, index in enumerate(layers):
            self.frozen.fetch(layers[min(place + 1, len(layers) - 1)])
            layer = manifest.layers[index]
            kept: Scope = {
                ("hidden", 0): scope.pop(("hidden", 0)),
                **{("side", i): scope["side", s] for i, s in enumerate(layer.sides)},
            }
            saving = index >= lowest and self.memory.saves(len(layers) - 1 - place)
            graph = manifest.kinds[layer.kind].graphs["forward_save" if saving else "forward"]
            results = self._run(graph, {**kept, **weights.of(layer.tensors, graph)})
            scope["hidden", 0] = results.pop(("hidden", 0))
            if index >= lowest:
                tape.append(Kept(index, saving, {**kept, **results}))
            if index < lowest or index != layers[-1]:
                self.frozen.release(index)
        return tape

    def _descend(
        self, tape: list[Kept], gradient: Value, plan: LayerPlan, weights: StepWeights, grads: Arrays
    ) -> None:
        """Walk the tape down; each layer's saved values are let go as soon as it is done."""
        manifest = self.artifact.manifest
        while tape:
            index, saved, values = tape.pop()
            if tape:
                self.frozen.fetch(tape[-1].layer)
            layer = manifest.layers[index]
            purpose = ("backward" if tape else "backward_lowest") + ("" if saved else "_recompute")
            graph = manifest.kinds[layer.kind].graphs[purpose]
            results = self._run(
                graph, {**values, ("d_hidden", 0): gradient, **weights.of(layer.tensors, graph)}
            )
            gradient = results.get(("d_hidden", 0))
            if plan[index] is Mode.TRAIN:
                found = self._gradients(results, layer.tensors)
                grads.update({n: np.add(grads[n], g) if n in grads else g for n, g in found.items()})
            self.frozen.release(index)

    def _run_head(
        self, scope: Scope, weights: StepWeights, *, backward: bool, keep_logits: bool
    ) -> HeadResult:
        """Loss, answers, the gradient of the hidden stream and the head's own gradients."""
        head = self.artifact.manifest.head
        if head.targets is None:
            end = self._whole_head(scope, weights, backward=backward)
        else:
            end = run_tokens(
                lambda rows, targets: self._some_tokens(rows, targets, weights),
                self._engine.array_of(scope.pop(("hidden", 0))),
                self._engine.array_of(scope[self._labels()]),
                targets=head.targets,
                num_classes=_num_classes(head),
                keep_logits=keep_logits,
                backward=backward,
            )
        self.frozen.release(OUTSIDE)
        return end

    def _whole_head(self, scope: Scope, weights: StepWeights, *, backward: bool) -> HeadResult:
        head = self.artifact.manifest.head
        ends = self._run(head.graphs["train"], {**scope, **weights.of(head.tensors, head.graphs["train"])})
        del scope["hidden", 0]
        logits, grads = self._engine.array_of(ends["logits", 0]), self._gradients(ends, head.tensors)
        gradient = self._engine.array_of(ends["d_hidden", 0]) if backward else None
        return HeadResult(
            float(self._engine.array_of(ends["loss", 0])), logits.argmax(-1), logits, gradient, grads
        )

    def _some_tokens(self, rows: Array, targets: Array, weights: StepWeights) -> tuple[float, Arrays]:
        """The head on tokens (1, rows): the sum of their losses, and logits, d_hidden and gradients by name."""
        head = self.artifact.manifest.head
        graph = head.graphs["train"]
        scope: Scope = {("hidden", 0): self._value(rows), self._labels(): self._value(targets)}
        ends = self._run(graph, {**scope, **weights.of(head.tensors, graph)})
        found = {role: self._engine.array_of(ends[role, 0]) for role in ("logits", "d_hidden")}
        return float(self._engine.array_of(ends["loss", 0])), {**found, **self._gradients(ends, head.tensors)}

    def _labels(self) -> tuple[Role, int]:
        names = [row.name for row in self.artifact.manifest.inputs]
        return "batch", names.index("labels")

    def _gradients(self, results: Scope, slots: Sequence[int]) -> Arrays:
        """A section's weight gradients by tensor name."""
        rows = self.artifact.manifest.tensors
        found = (
            (rows[slots[slot]].name, value) for (role, slot), value in results.items() if role == "d_weight"
        )
        return {name: np.asarray(self._engine.array_of(value), np.float32) for name, value in found}

    def _frozen_plan(self) -> LayerPlan:
        return (Mode.FORWARD,) * self.artifact.manifest.num_layers

    def _step_weights(self, adapter: Arrays) -> StepWeights:
        return StepWeights(self.frozen, self.artifact, self._engine.value_of, adapter)

    def _values(self, batch: Arrays) -> Scope:
        rows = enumerate(self.artifact.manifest.inputs)
        return {("batch", i): self._value(batch[row.name]) for i, row in rows if row.name in batch}

    def _value(self, array: Array) -> Value:
        return self._engine.value_of(np.ascontiguousarray(array))

    def _run(self, graph: Graph, scope: Mapping[tuple[Role, int], Value]) -> Scope:
        feeds = {port.name: scope[port.role, port.index] for port in graph.inputs}
        values = self._graph(graph.file).run(feeds, [port.name for port in graph.outputs])
        return {(port.role, port.index): value for port, value in zip(graph.outputs, values, strict=True)}

    def _graph(self, file: str) -> OpenGraph:
        if file not in self._graphs:
            self._graphs[file] = self._engine.open(self.artifact.folder / file)
        return self._graphs[file]


def _num_classes(head: Section) -> int:
    """The last dimension of the logits."""
    return next(int(port.shape[-1]) for port in head.graphs["train"].outputs if port.role == "logits")
