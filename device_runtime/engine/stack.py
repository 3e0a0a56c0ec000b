"""An artifact opened for training and prediction: checks batches, splits them into what runs together, and takes the mean."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import LOGITS_BYTES
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan
from fleetune.device_runtime.engine.batches import (
    Mean,
    Part,
    StepResult,
    check_batch,
    num_tokens,
    share_of,
    split,
)
from fleetune.device_runtime.engine.chain import Chain
from fleetune.device_runtime.engine.hidden_cache import PrefixRows
from fleetune.device_runtime.engine.lanes import Lanes, count_cores, count_lanes
from fleetune.device_runtime.engine.loaders import LOADERS, OpenGraph
from fleetune.device_runtime.engine.token_head import HeadResult
from fleetune.device_runtime.engine.weights import FrozenWeights, StepWeights
from fleetune.device_runtime.errors import ConfigError

Result = TypeVar("Result")


class Stack:
    """Block graphs, chained: on lanes of rows, or by threads that share each operator where the rows are too few."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int = 0,
        memory: MemoryPlan = SAVE_ALL,
        provider: str = "cpu",
        in_lanes: bool = True,
    ) -> None:
        """Prepare.

        Args:
            artifact: an opened artifact.
            threads: for the kernels, 0 = one per core.
            memory: how rows, activations and frozen weights are held.
            provider: of onnxruntime: ``cpu``, ``cuda``, ``tensorrt`` or ``xnnpack``.
            in_lanes: whether rows may be spread over the threads; int8 rounding and the order of sums can tell.

        Raises:
            ConfigError: a number below 0, or a provider that is not there.
        """
        self._loader = LOADERS[artifact.manifest.backend](threads, provider)
        self.artifact = artifact
        self.frozen = FrozenWeights(artifact, self._loader.value_of)
        self._threads, self._in_lanes = threads or count_cores(), in_lanes
        self._lanes = Lanes(1)
        self._way: Callable[[Path], OpenGraph] | None = None
        self._chain = Chain(artifact, self._loader, self._open, frozen=self.frozen)
        self._rows = self._tokens = 0
        self.use(memory)

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def lanes(self) -> int:
        """On how many the rows of a batch are run."""
        return self._lanes.count

    @property
    def opened(self) -> frozenset[str]:
        """The graph files opened so far, as the manifest names them."""
        return self._chain.opened

    def use(self, memory: MemoryPlan) -> None:
        """From the next step on, hold rows, activations and weights like this.

        Raises:
            ConfigError: a number below 0.
        """
        memory.check()
        self.memory = self._chain.memory = memory
        self.frozen.stream(memory.streamed)
        if self._rows:
            self.expect(self._rows, self._tokens)

    def expect(self, rows: int, tokens: int = 0) -> None:
        """Say how many rows a batch has from now on, and about how many tokens a row (0: unknown).

        Unless told, the first batch is taken for what the others will be. It sets the lanes, and before the first graph is
        opened also whether the graphs share a pool of threads.
        """
        self._rows, self._tokens = rows, tokens
        lanes = self.count_lanes(min(rows, self.memory.micro_batch or rows))
        self._chain.logits_bytes = LOGITS_BYTES // lanes
        if lanes != self.lanes:
            self._lanes.close()
            self._lanes = Lanes(lanes)

    def count_lanes(self, rows: int) -> int:
        """On how many lanes so many rows that run together would run."""
        if self._way is not None:
            return min(rows, self._threads) if self._way is self._loader.open_alone else 1
        can = self._in_lanes and self._loader.may_run_alone()
        return count_lanes(rows, self._threads, tokens=self._tokens) if can else 1

    def close(self) -> None:
        """Let go of threads, graphs and weights."""
        self._lanes.close()
        self._chain.close()
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

        def train(chain: Chain, part: Part) -> tuple[StepResult, int]:
            given = None if prefix is None else prefix.some(part.rows)
            made = chain.step(part.batch, plan, weights, keep_logits=keep_logits, prefix=given)
            return made, share_of(part.batch, manifest.head.targets)

        for made, share in self._in_parts(batch, train):
            mean.add(made, share)
        return mean.result()

    def evaluate(self, batch: Arrays, adapter: Arrays) -> tuple[float, NDArray[np.int64]]:
        """Mean loss and the likeliest class of each answer at full depth; ``batch`` as in :meth:`step`."""
        manifest = self.artifact.manifest
        check_batch(batch, manifest.inputs, bounds=manifest.bounds)
        weights, mean = self._step_weights(adapter), Mean(share_of(batch, manifest.head.targets))

        def measure(chain: Chain, part: Part) -> tuple[HeadResult, int]:
            return chain.evaluate(part.batch, weights), share_of(part.batch, manifest.head.targets)

        ends = self._in_parts(batch, measure)
        for end, share in ends:
            mean.add(StepResult(end.loss, None, {}), share)
        return mean.result().loss, np.concatenate([end.answers for end, _ in ends])

    def predict(self, batch: Arrays, adapter: Arrays) -> Array:
        """Logits at full depth; ``batch`` needs no labels."""
        return np.concatenate(self._predict(batch, adapter, lambda rows, hidden: hidden))

    def predict_at(self, batch: Arrays, adapter: Arrays, positions: NDArray[np.int64]) -> Array:
        """Logits (batch, vocabulary) of one token in each row, whose places are ``positions`` (batch,).

        Raises:
            ConfigError: the head does not work token by token.
        """
        if self.artifact.manifest.head.targets is None:
            raise ConfigError("this model answers once for a row, not at positions")

        def chosen(rows: slice, hidden: Array) -> Array:
            return hidden[np.arange(len(hidden)), positions[rows]][None]

        return np.concatenate([found[0] for found in self._predict(batch, adapter, chosen)])

    def _predict(
        self, batch: Arrays, adapter: Arrays, choose: Callable[[slice, Array], Array]
    ) -> list[Array]:
        """Logits of each part; ``choose`` takes its place in the batch and its hidden stream, and gives what the head sees."""
        manifest, weights = self.artifact.manifest, self._step_weights(adapter)
        given = {name: array for name, array in batch.items() if name != "labels"}
        rows = [row for row in manifest.inputs if row.name != "labels"]
        check_batch(given, rows, bounds=manifest.bounds)

        def logits(chain: Chain, part: Part) -> Array:
            return chain.predict(part.batch, weights, partial(choose, part.rows))

        return self._in_parts(given, logits)

    def _in_parts(self, batch: Arrays, work: Callable[[Chain, Part], Result]) -> list[Result]:
        """``work`` on the rows that run together: one micro-batch after the other, the lanes of each at the same time."""
        inputs = [row for row in self.artifact.manifest.inputs if row.name in batch]
        found: list[Result] = []
        for group in split(batch, inputs, self.memory.micro_batch):
            if not self._rows:
                self.expect(group.size, num_tokens(group.batch, inputs))
            parts = split(group.batch, inputs, -(-group.size // self.lanes))
            found += self._lanes.each(partial(work, self._chain), [part.within(group) for part in parts])
        return found

    def _open(self, path: Path) -> OpenGraph:
        """The first graph decides for the others."""
        if self._way is None:
            fits = self.lanes == self._threads and self._loader.may_run_alone()
            self._way = (self._loader.open_alone if fits else None) or self._loader.open
        return self._way(path)

    def _step_weights(self, adapter: Arrays) -> StepWeights:
        return StepWeights(self.frozen, self.artifact, self._loader.value_of, adapter)
