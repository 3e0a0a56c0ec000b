"""The steps of a local run before they are taken: plans, batches, and what a device's hidden cache will hold."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.plans import LayerPlan, Route, learnable, route
from fleetune.device_runtime.contracts.wire import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.methods.policies import PolicyState, make_policy

_HALF_BYTES = 2


class StepKind(NamedTuple):
    """What a step's time depends on beside its tokens: how many layers there are of each sort."""

    below: int
    """Run below the boundary, where hidden streams may be kept."""
    between: int
    """Run from there to the lowest trained layer."""
    trained: int
    passed: int
    """Above the lowest trained layer: frozen or bare, on the way back."""
    around: int
    """Above it: the gradient goes around them."""
    bare: int
    """Of all that run, without their LoRA."""

    @classmethod
    def of(cls, way: Route) -> "StepKind":
        """Count the layers of a route."""
        around = [i for i in way.around if i >= way.lowest]
        return cls(
            len(way.below),
            sum(way.boundary <= i < way.lowest for i in way.layers),
            len(way.trained),
            len(way.back) - len(way.trained),
            len(around),
            len(way.bare),
        )


class Step(NamedTuple):
    """One step to come."""

    plan: LayerPlan
    way: Route
    kind: StepKind
    examples: Indices
    """Indices in the device's data set."""
    width: int
    """Tokens of each row, padding included."""

    @property
    def tokens(self) -> int:
        """Of the batch."""
        return len(self.examples) * self.width


def schedule(work: LocalWork, dataset: Dataset, manifest: Manifest) -> list[Step]:
    """The steps that :class:`fleetune.device_runtime.training.trainer.Trainer` will take; only lengths of ``dataset`` are read.

    For policies that are functions of seed and step alone.
    """
    num_batches = dataset.num_batches(work.batch_size)
    total = work.steps or work.epochs * num_batches
    policy, state = make_policy(work.policy, manifest.num_layers), PolicyState()
    steps, batches = [], list[Indices]()
    for i in range(total):
        epoch, place = divmod(i, num_batches)
        if place == 0:
            batches = dataset.epoch_batches(work.seed, epoch, work.batch_size)
        drawn = policy(work.rounds_before * total + i, Draws(work.seed, "plans", i), state)
        plan = learnable(drawn, manifest.learning)
        way = route(plan, cache_below=work.cache_below)
        steps.append(Step(plan, way, StepKind.of(way), batches[place], dataset.width_of(batches[place])))
    return steps


class CacheModel:
    """Which examples a device's hidden cache holds: what :class:`HiddenCache` would, without what it would hold of them."""

    def __init__(self, *, limit_bytes: int, width: int) -> None:
        """Begin empty; ``width`` of the hidden stream."""
        self._limit, self._row_bytes = limit_bytes, _HALF_BYTES * width
        self._below: tuple[object, ...] = ()
        self._held: set[int] = set()
        self._end = 0

    def clear(self) -> None:
        """Forget all: the device was started again."""
        self._below, self._end = (), 0
        self._held.clear()

    def hit_shares(
        self, steps: list[Step], dataset: Dataset, versions: Mapping[int, object]
    ) -> Iterator[float]:
        """Share of each step's rows that are found; ``versions`` says of a layer which adapter it starts with."""
        trained: dict[int, int] = {}
        for step in steps:
            made_of = tuple((versions.get(i), trained.get(i, 0)) for i in step.way.below)
            yield self._take((step.way.below, made_of), step, dataset) if step.way.below else 0.0
            for layer in step.way.trained:
                trained[layer] = trained.get(layer, 0) + 1

    def _take(self, below: tuple[object, ...], step: Step, dataset: Dataset) -> float:
        if below != self._below:
            self.clear()
            self._below = below
        missing = [int(i) for i in step.examples if int(i) not in self._held]
        for example in missing:
            size = self._row_bytes * min(step.width, int(dataset.lengths[example]))
            if self._end + size <= self._limit:
                self._held.add(example)
                self._end += size
        return 1 - len(missing) / len(step.examples)
