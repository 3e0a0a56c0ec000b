"""Chains prelude, blocks and head there and back, following a layer plan.

Source of layer dropping: DropPEFT, arXiv 2503.10217. A dropped layer is the identity: its graphs are not run,
its weights not read.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from device_runtime.arrays import Array, Arrays
from device_runtime.artifact import Artifact
from device_runtime.errors import ArtifactError, ConfigError
from device_runtime.graphs import OnnxGraph, Value, array_of, set_threads, value_of
from device_runtime.manifest import Graph, Input, Role, Section
from device_runtime.plans import LayerPlan, Mode, active_layers, lowest_trained

Scope = dict[tuple[Role, int], Value]


class StepResult(NamedTuple):
    """``grads`` are float32 by tensor name, for the trained layers and the head."""

    loss: float
    logits: Array
    grads: Arrays


class Stack:
    """An artifact opened for training and prediction; graphs are opened when first needed."""

    def __init__(self, artifact: Artifact, *, threads: int = 0, recompute: bool = False) -> None:
        """Prepare.

        Args:
            artifact: an opened artifact.
            threads: for the kernels, 0 = one per core.
            recompute: keep only each layer's input for the way back and run its forward again there (less memory, one
                more forward).
        """
        set_threads(threads)
        self.artifact = artifact
        self.recompute = recompute
        self._threads = threads
        self._graphs: dict[str, OnnxGraph] = {}
        self._frozen: dict[int, Value] = {}

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of graphs and weights."""
        self._graphs.clear()
        self._frozen.clear()

    def step(self, batch: Arrays, plan: LayerPlan, adapter: Arrays) -> StepResult:
        """Run forward and backward once over the active layers; weights are not touched.

        Args:
            batch: arrays by the manifest's input names, ``labels`` included.
            plan: one mode per layer.
            adapter: every trainable tensor by name, float32.

        Returns:
            Mean loss, logits, and gradients by tensor name, float32, for the trained layers and the head only.

        Raises:
            ArtifactError: a name, dtype or shape differs from the manifest (all differences listed).
            ConfigError: a plan of another length.
        """
        if len(plan) != self.artifact.manifest.num_layers:
            raise ConfigError(
                f"plan of {len(plan)} layers; the model has {self.artifact.manifest.num_layers}"
            )
        weights = _Weights(self, adapter)
        scope = self._batch(batch)
        tape = self._forward(scope, plan, weights)
        grads: Arrays = {}
        ends = self._run_head("train", scope, weights, grads, backward=lowest_trained(plan) < len(plan))
        self._backward(tape, ends.get(("d_hidden", 0)), plan, weights, grads)
        return StepResult(float(array_of(ends["loss", 0])), array_of(ends["logits", 0]), grads)

    def evaluate(self, batch: Arrays, adapter: Arrays) -> tuple[float, Array]:
        """Mean loss and logits at full depth; ``batch`` as in :meth:`step`."""
        weights = _Weights(self, adapter)
        scope = self._batch(batch)
        self._forward(scope, self._frozen_plan(), weights)
        ends = self._run_head("train", scope, weights, None, backward=False)
        return float(array_of(ends["loss", 0])), array_of(ends["logits", 0])

    def predict(self, batch: Arrays, adapter: Arrays) -> Array:
        """Logits at full depth; ``batch`` needs no labels."""
        weights = _Weights(self, adapter)
        scope = self._batch({k: v for k, v in batch.items() if k != "labels"}, without_labels=True)
        self._forward(scope, self._frozen_plan(), weights)
        return array_of(self._run_head("predict", scope, weights, None, backward=False)["logits", 0])

    def _frozen_plan(self) -> LayerPlan:
        return (Mode.FORWARD,) * self.artifact.manifest.num_layers

    def _batch(self, batch: Arrays, *, without_labels: bool = False) -> Scope:
        rows = [
            (i, row)
            for i, row in enumerate(self.artifact.manifest.inputs)
            if not (without_labels and row.name == "labels")
        ]
        _check_batch(batch, [row for _, row in rows])
        return {("batch", i): value_of(np.ascontiguousarray(batch[row.name])) for i, row in rows}

    def _forward(self, scope: Scope, plan: LayerPlan, weights: "_Weights") -> list[tuple[int, Scope]]:
        """Fill ``scope`` with the last hidden stream; return what the way back needs, lowest layer first."""
        manifest = self.artifact.manifest
        prelude = manifest.prelude
        made = self._run(
            prelude.graphs["forward"], {**scope, **weights.of(prelude.tensors, prelude.graphs["forward"])}
        )
        hidden, lowest = made.pop(("hidden", 0)), lowest_trained(plan)
        tape: list[tuple[int, Scope]] = []
        for index in active_layers(plan):
            layer = manifest.layers[index]
            kept: Scope = {
                ("hidden", 0): hidden,
                **{("side", i): made["side", s] for i, s in enumerate(layer.sides)},
            }
            saving = index >= lowest and not self.recompute
            graph = manifest.kinds[layer.kind].graphs["forward_save" if saving else "forward"]
            results = self._run(graph, {**kept, **weights.of(layer.tensors, graph)})
            hidden = results.pop(("hidden", 0))
            if index >= lowest:
                tape.append((index, {**kept, **results}))
        scope["hidden", 0] = hidden
        return tape

    def _run_head(
        self, purpose: str, scope: Scope, weights: "_Weights", grads: Arrays | None, *, backward: bool
    ) -> Scope:
        head: Section = self.artifact.manifest.head
        graph = head.graphs[purpose]
        ends = self._run(graph, {**scope, **weights.of(head.tensors, graph)})
        del scope["hidden", 0]
        if grads is not None:
            self._collect(ends, head.tensors, grads)
        if not backward:
            ends.pop(("d_hidden", 0), None)
        return ends

    def _backward(
        self,
        tape: list[tuple[int, Scope]],
        gradient: Value,
        plan: LayerPlan,
        weights: "_Weights",
        grads: Arrays,
    ) -> None:
        """Walk the tape down; each layer's saved values are let go as soon as it is done."""
        manifest = self.artifact.manifest
        while tape:
            index, kept = tape.pop()
            layer = manifest.layers[index]
            purpose = ("backward" if tape else "backward_lowest") + ("_recompute" if self.recompute else "")
            graph = manifest.kinds[layer.kind].graphs[purpose]
            feeds = {**kept, ("d_hidden", 0): gradient, **weights.of(layer.tensors, graph)}
            results = self._run(graph, feeds)
            gradient = results.get(("d_hidden", 0))
            if plan[index] is Mode.TRAIN:
                self._collect(results, layer.tensors, grads)

    def _collect(self, results: Scope, slots: Sequence[int], grads: Arrays) -> None:
        """Add this section's weight gradients; a tensor shared by several layers sums them."""
        for (role, slot), value in results.items():
            if role == "d_weight":
                name = self.artifact.manifest.tensors[slots[slot]].name
                found = np.asarray(array_of(value), np.float32)
                grads[name] = np.add(grads[name], found) if name in grads else found

    def _run(self, graph: Graph, scope: Mapping[tuple[Role, int], Value]) -> Scope:
        feeds = {port.name: scope[port.role, port.index] for port in graph.inputs}
        values = self._graph(graph.file).run(feeds, [port.name for port in graph.outputs])
        return {(port.role, port.index): value for port, value in zip(graph.outputs, values, strict=True)}

    def _graph(self, file: str) -> OnnxGraph:
        if file not in self._graphs:
            self._graphs[file] = OnnxGraph(self.artifact.folder / file, threads=self._threads)
        return self._graphs[file]

    def frozen(self, index: int) -> Value:
        """A frozen tensor by its row in the table; mapped, not copied, and read only when a graph runs on it."""
        if index not in self._frozen:
            self._frozen[index] = value_of(self.artifact.base(self.artifact.manifest.tensors[index]))
        return self._frozen[index]


class _Weights:
    """The weight slots of sections: frozen ones from the mapped file, trainable ones from the adapter of this step."""

    def __init__(self, stack: Stack, adapter: Arrays) -> None:
        self._stack = stack
        self._adapter = adapter
        self._rows = stack.artifact.manifest.tensors

    def of(self, slots: Sequence[int], graph: Graph) -> Scope:
        wanted = [port.index for port in graph.inputs if port.role == "weight"]
        return {("weight", slot): self._value(slots[slot]) for slot in wanted}

    def _value(self, index: int) -> Value:
        row = self._rows[index]
        if not row.trainable:
            return self._stack.frozen(index)
        array = self._adapter.get(row.name)
        if array is None or array.shape != row.shape or array.dtype != np.dtype(row.dtype):
            got = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise ArtifactError(
                f"adapter tensor {row.name}: expected {row.dtype}{list(row.shape)}, got {got}"
            )
        return value_of(array)


def _check_batch(batch: Arrays, rows: Sequence[Input]) -> None:
    """Names, dtypes and shapes of a batch against the manifest; symbols must agree across arrays."""
    problems = [f"{n}: not an input of this model" for n in sorted(batch.keys() - {row.name for row in rows})]
    symbols: dict[str, int] = {}
    for row in rows:
        array = batch.get(row.name)
        if array is None:
            problems.append(f"{row.name}: missing")
        elif array.dtype != np.dtype(row.dtype) or not _fits(array.shape, row.shape, symbols):
            want = f"{row.dtype}[{', '.join(map(str, row.shape))}]"
            problems.append(f"{row.name}: expected {want}, got {array.dtype}{list(array.shape)}")
    if problems:
        raise ArtifactError("batch does not fit the model: " + "; ".join(problems))


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...], symbols: dict[str, int]) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(
        extent == (symbols.setdefault(w, extent) if isinstance(w, str) else w)
        for extent, w in zip(shape, wanted, strict=True)
    )
