"""An artifact's block graphs as an engine: checks batches, cuts them into what runs together, and takes the mean."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from threading import Lock
from typing import TypeVar

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Floats, Indices
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.class_means import ClassHead, class_head
from fleetune.device_runtime.contracts.manifest import LOGITS_BYTES
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, Route, frozen, learnable, route
from fleetune.device_runtime.engine.batches import (
    Mean,
    Part,
    StepResult,
    check_batch,
    num_rows,
    num_tokens,
    parts,
    share_of,
)
from fleetune.device_runtime.engine.chain import Chain
from fleetune.device_runtime.engine.decoding import Decoding, Recomputed, check_generates
from fleetune.device_runtime.engine.engine import OfRow, Setup
from fleetune.device_runtime.engine.gates import Gates, check_gates, lowest_shut, open_layers
from fleetune.device_runtime.engine.hidden_cache import OpenRows
from fleetune.device_runtime.engine.lanes import Lanes, Rows, count_cores, one_by_one, rows_for
from fleetune.device_runtime.engine.loaders import Loader
from fleetune.device_runtime.engine.token_head import HeadResult, chunk_bytes
from fleetune.device_runtime.engine.watchdog import Watchdog
from fleetune.device_runtime.engine.weighted_head import label_weights
from fleetune.device_runtime.engine.weights import FrozenWeights, StepWeights, check_bare
from fleetune.device_runtime.errors import ConfigError

R = TypeVar("R")


class Stack:
    """Block graphs, chained: on lanes of rows, or by threads that share each operator where the rows are too few.

    Graphs for either way are opened when first needed and stay beside each other.
    """

    def __init__(self, artifact: Artifact, loader: Loader, setup: Setup) -> None:
        """Prepare; ConfigError for a number below 0 in the setup's memory plan."""
        setup.memory.check()
        self.artifact = artifact
        self._loader, self._setup = loader, setup
        self._threads = setup.threads or count_cores()
        self._frozen = FrozenWeights(artifact, loader.value_of)
        self._lanes = Lanes(self._threads)
        self._chains: dict[int, Chain] = {}
        self._opening = Lock()
        self._watchdog = Watchdog(setup.most_step_s, loader.stop)

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def opened(self) -> frozenset[str]:
        """The graph files opened so far, as the manifest names them."""
        return frozenset(file for chain in self._chains.values() for file in chain.opened)

    def close(self) -> None:
        """Let go of threads, graphs and weights."""
        self._watchdog.close()
        self._lanes.close()
        for chain in self._chains.values():
            chain.close()
        self._frozen.close()

    def rows(self, size: int, tokens: int = 0, memory: MemoryPlan | None = None) -> Rows:
        """As :meth:`Engine.rows`."""
        found = rows_for(size, tokens, self._threads, self._setup.memory if memory is None else memory)
        return found if self._setup.in_lanes and self._loader.in_lanes else found._replace(lanes=1)

    def step(
        self,
        batch: Arrays,
        plan: LayerPlan,
        adapter: Arrays,
        *,
        rows: Rows | None = None,
        keep_logits: bool = False,
        hidden: OpenRows | None = None,
        gates: Gates | None = None,
        cache_below: int = -1,
        each: OfRow | None = None,
        class_weights: Floats | None = None,
    ) -> StepResult:
        """As :meth:`Engine.step`."""
        self._check_plan(plan)
        manifest = self.artifact.manifest
        rows, plan = self._checked(batch, rows), learnable(plan, manifest.learning)
        rows = one_by_one(rows) if each else rows
        if gates is not None:
            check_gates(gates, plan, num_rows(batch, manifest.inputs))
            plan = open_layers(plan, gates)
            cache_below = min(route(plan, cache_below=cache_below).boundary, lowest_shut(gates))
        way, weights = route(plan, rows.memory, cache_below=cache_below), self._weights(adapter, rows)
        check_bare(way, manifest)
        stored = hidden(self._below(way, adapter)) if hidden and way.below else None

        def train(chain: Chain, part: Part) -> tuple[StepResult, float]:
            some = None if stored is None else stored.some(part.place)
            here = None if gates is None else gates[:, part.place]
            own = (
                way if here is None else route(open_layers(plan, here), rows.memory, cache_below=cache_below)
            )
            made = chain.step(
                part.arrays,
                own,
                weights,
                keep_logits=keep_logits,
                hidden=some,
                gates=here,
                class_weights=class_weights,
            )
            if each is None:
                return made, self._share(part.arrays, class_weights)
            return made._replace(grads=each(made.grads)), min(1, self._share(part.arrays))

        mean = Mean(1 if each else self._share(batch, class_weights))
        for made, share in self._in_parts(batch, rows, train):
            mean.add(made, share)
        return mean.result()

    def evaluate(self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None) -> tuple[float, Array]:
        """As :meth:`Engine.evaluate`."""
        rows = self._checked(batch, rows)
        weights = self._weights(adapter, rows)

        def measure(chain: Chain, part: Part) -> tuple[HeadResult, float]:
            return chain.evaluate(part.arrays, weights), self._share(part.arrays)

        mean = Mean(self._share(batch))
        ends = self._in_parts(batch, rows, measure)
        for end, share in ends:
            mean.add(StepResult(end.loss, None, {}), share)
        return mean.result().loss, np.concatenate([end.answers for end, _ in ends])

    def predict(
        self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None, plan: LayerPlan | None = None
    ) -> Array:
        """As :meth:`Engine.predict`."""
        return np.concatenate(self._predict(batch, adapter, rows, plan, lambda place, hidden: hidden))

    def predict_at(
        self,
        batch: Arrays,
        adapter: Arrays,
        positions: Indices,
        *,
        rows: Rows | None = None,
        plan: LayerPlan | None = None,
    ) -> Array:
        """As :meth:`Engine.predict_at`."""
        if self.artifact.manifest.head.targets is None:
            raise ConfigError("this model answers once for a row, not at positions")

        def chosen(place: slice, hidden: Array) -> Array:
            return hidden[np.arange(len(hidden)), positions[place]][None]  # (1, B, H)

        return np.concatenate([found[0] for found in self._predict(batch, adapter, rows, plan, chosen)])

    def decode(self, adapter: Arrays, *, plan: LayerPlan | None = None) -> Decoding:
        """As :meth:`Engine.decode`."""
        manifest = self.artifact.manifest
        check_generates(manifest)
        if plan is not None:
            self._check_plan(plan)
        if not manifest.has_steps:
            return Recomputed(manifest, self._after, adapter, plan)
        return self._chain(1).decode(self._weights(adapter, self.rows(1)), plan)

    def _after(
        self, batch: Arrays, adapter: Arrays, positions: Indices, *, plan: LayerPlan | None = None
    ) -> Array:
        if self.artifact.manifest.head.targets is None:
            return self.predict(batch, adapter, plan=plan)[np.arange(len(positions)), positions]
        return self.predict_at(batch, adapter, positions, plan=plan)

    def features(
        self,
        batch: Arrays,
        adapter: Arrays,
        *,
        rows: Rows | None = None,
        hidden: OpenRows | None = None,
        cache_below: int = 0,
    ) -> Array:
        """As :meth:`Engine.features`: with C rows of the identity for a head, C of the features are its logits."""
        head = class_head(self.artifact.manifest)
        rows, given = self._unlabelled(batch, rows)
        weights = self._weights(adapter, rows)
        heads = [self._weights({**adapter, **identity}, rows) for identity in _identities(head, adapter)]
        way = route(frozen(self.artifact.manifest.num_layers), cache_below=cache_below)
        stored = hidden(self._below(way, adapter)) if hidden and way.below else None

        def seen(chain: Chain, part: Part) -> Array:
            some = None if stored is None else stored.some(part.place)
            return chain.features(part.arrays, way, weights, heads, hidden=some)

        width = adapter[head.weight].shape[1]
        return np.concatenate(self._in_parts(given, rows, seen))[:, :width]

    def _predict(
        self,
        batch: Arrays,
        adapter: Arrays,
        rows: Rows | None,
        plan: LayerPlan | None,
        choose: Callable[[slice, Array], Array],
    ) -> list[Array]:
        """Logits of each part; ``choose`` takes its place in the batch and its hidden stream, and gives what the head sees."""
        if plan is not None:
            self._check_plan(plan)
        rows, given = self._unlabelled(batch, rows)
        weights = self._weights(adapter, rows)

        def logits(chain: Chain, part: Part) -> Array:
            return chain.predict(part.arrays, weights, partial(choose, part.place), plan=plan)

        return self._in_parts(given, rows, logits)

    def _unlabelled(self, batch: Arrays, rows: Rows | None) -> tuple[Rows, Arrays]:
        """How a batch runs, and the batch without labels; errors as of :func:`check_batch`."""
        given = {name: array for name, array in batch.items() if name != self.artifact.manifest.label_name}
        return self._checked(given, rows, labelled=False), given

    def _check_plan(self, plan: LayerPlan) -> None:
        if len(plan) != self.artifact.manifest.num_layers:
            raise ConfigError(
                f"plan of {len(plan)} layers; the model has {self.artifact.manifest.num_layers}"
            )

    def _checked(self, batch: Arrays, rows: Rows | None, *, labelled: bool = True) -> Rows:
        """How a batch runs, after a look at it; errors as of :func:`check_batch`."""
        manifest = self.artifact.manifest
        inputs = manifest.inputs if labelled else manifest.features
        check_batch(batch, inputs, bounds=manifest.bounds)
        return rows or self.rows(num_rows(batch, inputs), num_tokens(batch, inputs))

    def _in_parts(self, batch: Arrays, rows: Rows, work: Callable[[Chain, Part], R]) -> list[R]:
        """``work`` on the rows that run together: one micro-batch after the other, the lanes of each at the same time."""
        inputs = [row for row in self.artifact.manifest.inputs if row.name in batch]
        run = partial(work, self._chain(rows.lanes))
        with self._watchdog:
            return [found for group in parts(batch, inputs, rows) for found in self._lanes.each(run, group)]

    def _chain(self, lanes: int) -> Chain:
        """The graphs as so many lanes run them: each by one thread, or, on a single lane, by all threads together."""
        with self._opening:
            if lanes not in self._chains:
                self._chains[lanes] = Chain(
                    self.artifact,
                    self._loader,
                    threads=1 if lanes > 1 else self._threads,
                    logits_bytes=chunk_bytes(
                        self.artifact.manifest.num_logits, lanes=lanes, logits_bytes=LOGITS_BYTES
                    ),
                )
            return self._chains[lanes]

    def _weights(self, adapter: Arrays, rows: Rows) -> StepWeights:
        return self._frozen.of_step(adapter, streamed=rows.memory.streamed)

    def _share(self, batch: Arrays, class_weights: Floats | None = None) -> float:
        manifest = self.artifact.manifest
        labels, counted = batch[manifest.label_name], manifest.counted
        if class_weights is None or counted is None:
            return share_of(labels, counted)
        return float(label_weights(labels, class_weights, counted).sum(dtype=np.float64))

    def _below(self, way: Route, adapter: Arrays) -> Mapping[str, Array]:
        """What makes the hidden stream below the boundary, beside the base: layers, how they run, and their adapters."""
        m = self.artifact.manifest
        bare = [i for i in way.below if i in way.bare]
        used = {*m.prelude.tensors, *(i for layer in way.below for i in m.layers[layer].tensors)}
        names = sorted(m.tensors[i].name for i in used if m.tensors[i].trainable)
        modes = {"layers": np.array(way.below), "bare": np.array(bare)}
        return {**modes, **{name: adapter[name] for name in names}}


def _identities(head: ClassHead, adapter: Arrays) -> Iterator[Arrays]:
    """Heads without bias whose weights (C, D) are the rows of the identity (D, D), C at a time, and zeros after its end."""
    classes, width = adapter[head.weight].shape
    for start in range(0, width, classes):
        weight = np.eye(classes, width, k=start, dtype=np.float32)
        yield {head.weight: weight} | ({head.bias: np.zeros(classes, np.float32)} if head.bias else {})
