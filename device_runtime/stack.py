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
from device_runtime.errors import ArtifactError, ConfigError
from device_runtime.loaders import LOADERS, OpenGraph, Value
from device_runtime.manifest import Graph, Input, Role, Section
from device_runtime.plans import LayerPlan, Mode, active_layers, lowest_trained
from device_runtime.token_head import HeadResult, run_tokens

Scope = dict[tuple[Role, int], Value]


class StepResult(NamedTuple):
    """``grads`` are float32 by tensor name, for the trained layers and the head.

    ``logits`` are None where the head works in chunks, unless they were asked for.
    """

    loss: float
    logits: Array | None
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
        self._engine = LOADERS[artifact.manifest.backend]
        self._engine.set_threads(threads)
        self.artifact = artifact
        self.recompute = recompute
        self._threads = threads
        self._graphs: dict[str, OpenGraph] = {}
        self._frozen: dict[int, Value] = {}

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of graphs and weights."""
        self._graphs.clear()
        self._frozen.clear()

    def step(
        self, batch: Arrays, plan: LayerPlan, adapter: Arrays, *, keep_logits: bool = False
    ) -> StepResult:
        """Run forward and backward once over the active layers; weights are not touched.

        Args:
            batch: arrays by the manifest's input names, ``labels`` included.
            plan: one mode per layer.
            adapter: every trainable tensor by name, float32.
            keep_logits: return them also where they are large (batch x seq x vocabulary).

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
        backward = lowest_trained(plan) < len(plan)
        end = self._train_head(scope, weights, grads, backward=backward, keep_logits=keep_logits)
        gradient = None if end.d_hidden is None else self._engine.value_of(end.d_hidden)
        self._backward(tape, gradient, plan, weights, grads)
        return StepResult(end.loss, end.logits, grads)

    def evaluate(self, batch: Arrays, adapter: Arrays) -> tuple[float, NDArray[np.int64]]:
        """Mean loss and the likeliest class of each answer at full depth; ``batch`` as in :meth:`step`."""
        weights = _Weights(self, adapter)
        scope = self._batch(batch)
        self._forward(scope, self._frozen_plan(), weights)
        end = self._train_head(scope, weights, None, backward=False, keep_logits=False)
        return end.loss, end.answers

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
        head = self.artifact.manifest.head
        weights = _Weights(self, adapter)
        scope = self._batch({k: v for k, v in batch.items() if k != "labels"}, without_labels=True)
        self._forward(scope, self._frozen_plan(), weights)
        scope["hidden", 0] = self._engine.value_of(
            np.ascontiguousarray(choose(self._engine.array_of(scope["hidden", 0])))
        )
        graph = head.graphs["predict"]
        return self._engine.array_of(
            self._run(graph, {**scope, **weights.of(head.tensors, graph)})["logits", 0]
        )

    def _frozen_plan(self) -> LayerPlan:
        return (Mode.FORWARD,) * self.artifact.manifest.num_layers

    def _batch(self, batch: Arrays, *, without_labels: bool = False) -> Scope:
        rows = [
            (i, row)
            for i, row in enumerate(self.artifact.manifest.inputs)
            if not (without_labels and row.name == "labels")
        ]
        _check_batch(batch, [row for _, row in rows], bounds=self.artifact.manifest.bounds)
        return {("batch", i): self._engine.value_of(np.ascontiguousarray(batch[row.name])) for i, row in rows}

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

    def _train_head(
        self, scope: Scope, weights: "_Weights", grads: Arrays | None, *, backward: bool, keep_logits: bool
    ) -> HeadResult:
        """Loss, answers and the gradient of the hidden stream; the head's own gradients go to ``grads``."""
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
        if grads is not None:
            grads.update(end.grads)
        return end

    def _whole_head(self, scope: Scope, weights: "_Weights", *, backward: bool) -> HeadResult:
        head = self.artifact.manifest.head
        ends = self._run(head.graphs["train"], {**scope, **weights.of(head.tensors, head.graphs["train"])})
        del scope["hidden", 0]
        logits, grads = self._engine.array_of(ends["logits", 0]), self._gradients(ends, head.tensors)
        gradient = self._engine.array_of(ends["d_hidden", 0]) if backward else None
        return HeadResult(
            float(self._engine.array_of(ends["loss", 0])), logits.argmax(-1), logits, gradient, grads
        )

    def _some_tokens(self, rows: Array, targets: Array, weights: "_Weights") -> tuple[float, Arrays]:
        """The head on tokens (1, rows): the sum of their losses, and logits, d_hidden and gradients by name."""
        head = self.artifact.manifest.head
        graph = head.graphs["train"]
        given = {("hidden", 0): rows, self._labels(): targets}
        scope: Scope = {
            port: self._engine.value_of(np.ascontiguousarray(array)) for port, array in given.items()
        }
        ends = self._run(graph, {**scope, **weights.of(head.tensors, graph)})
        found = {role: self._engine.array_of(ends[role, 0]) for role in ("logits", "d_hidden")}
        return float(self._engine.array_of(ends["loss", 0])), {**found, **self._gradients(ends, head.tensors)}

    def _labels(self) -> tuple[Role, int]:
        names = [row.name for row in self.artifact.manifest.inputs]
        return "batch", names.index("labels")

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
                found = self._gradients(results, layer.tensors)
                grads.update({n: np.add(grads[n], g) if n in grads else g for n, g in found.items()})

    def _gradients(self, results: Scope, slots: Sequence[int]) -> Arrays:
        """A section's weight gradients by tensor name."""
        rows = self.artifact.manifest.tensors
        found = (
            (rows[slots[slot]].name, value) for (role, slot), value in results.items() if role == "d_weight"
        )
        return {name: np.asarray(self._engine.array_of(value), np.float32) for name, value in found}

    def _run(self, graph: Graph, scope: Mapping[tuple[Role, int], Value]) -> Scope:
        feeds = {port.name: scope[port.role, port.index] for port in graph.inputs}
        values = self._graph(graph.file).run(feeds, [port.name for port in graph.outputs])
        return {(port.role, port.index): value for port, value in zip(graph.outputs, values, strict=True)}

    def _graph(self, file: str) -> OpenGraph:
        if file not in self._graphs:
            self._graphs[file] = self._engine.open(self.artifact.folder / file, self._threads)
        return self._graphs[file]

    def hold(self, array: Array) -> Value:
        """The array as the backend holds it; shares its memory."""
        return self._engine.value_of(array)

    def frozen(self, index: int) -> Value:
        """A frozen tensor by its row in the table; mapped, not copied, and read only when a graph runs on it."""
        if index not in self._frozen:
            self._frozen[index] = self._engine.value_of(
                self.artifact.base(self.artifact.manifest.tensors[index])
            )
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
        return self._stack.hold(array)


def _num_classes(head: Section) -> int:
    """The last dimension of the logits."""
    return next(int(port.shape[-1]) for port in head.graphs["train"].outputs if port.role == "logits")


def _check_batch(batch: Arrays, rows: Sequence[Input], *, bounds: Mapping[str, int]) -> None:
    """Names, dtypes and shapes of a batch against the manifest; symbols must agree across arrays and keep their bounds."""
    problems = [f"{n}: not an input of this model" for n in sorted(batch.keys() - {row.name for row in rows})]
    symbols: dict[str, int] = {}
    for row in rows:
        array = batch.get(row.name)
        if array is None:
            problems.append(f"{row.name}: missing")
        elif array.dtype != np.dtype(row.dtype) or not _fits(array.shape, row.shape, symbols):
            want = f"{row.dtype}[{', '.join(map(str, row.shape))}]"
            problems.append(f"{row.name}: expected {want}, got {array.dtype}{list(array.shape)}")
    problems += [f"{n} {e}: at most {bounds[n]}" for n, e in symbols.items() if e > bounds.get(n, e)]
    if problems:
        raise ArtifactError("batch does not fit the model: " + "; ".join(problems))


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...], symbols: dict[str, int]) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(
        extent == (symbols.setdefault(w, extent) if isinstance(w, str) else w)
        for extent, w in zip(shape, wanted, strict=True)
    )
