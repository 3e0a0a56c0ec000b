"""This machine as a run may use it: cores, provider, memory. Opens an artifact's engine and fits each run to what there is."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.thresholds import pruned
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.samples import Dataset, Ragged
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.batches import num_tokens
from fleetune.device_runtime.engine.footprint import holds_whole_models
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.policies import first_boundary
from fleetune.device_runtime.methods.work import check_work
from fleetune.device_runtime.options import problems, refuse
from fleetune.device_runtime.training.budget import Fit, expected_mb, fit, resident_mb
from fleetune.device_runtime.training.class_means import class_sums
from fleetune.device_runtime.training.evaluation import Evaluation, OnAnswers, evaluate
from fleetune.device_runtime.training.held_out import split
from fleetune.device_runtime.training.skip_effects import KeptEffects
from fleetune.device_runtime.training.trainer import Trainer

log = logging.getLogger(__name__)


class Machine:
    """An opened engine, and the hidden cache of one data set at a time."""

    def __init__(
        self, artifact: Artifact, resources: Resources, *, folder: Path, most_step_s: float = 0.0
    ) -> None:
        """Pin the process to its cores and open the engine.

        Args:
            artifact: an opened artifact.
            resources: what may be used.
            folder: where the hidden cache lies while this is open.
            most_step_s: longest time of a step, after which it is stopped; 0 for any.

        Raises:
            ConfigError: a number out of range, cores or a provider that are not there, or a budget beside what it would choose.
        """
        _check(resources)
        pinned = pin(resources.cores) if resources.cores else 0
        self.memory = MemoryPlan(saved_layers=0 if resources.recompute else None, streamed=resources.stream)
        """How steps and evaluations are held: as the last work asks; under a budget, what it was fitted to."""
        self.engine = open_engine(
            artifact,
            threads=resources.threads or pinned,
            memory=self.memory,
            provider=resources.provider,
            most_step_s=most_step_s,
        )
        self.fit: Fit | None = None
        """What the budget came to for the last run; None without one."""
        self._artifact, self._resources, self._folder = artifact, resources, folder
        self._hidden: tuple[str, HiddenCache] | None = None
        self._held_mb = 0.0
        self._effects = KeptEffects(self.engine, folder)

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engine and remove the hidden cache."""
        self.engine.close()
        if self._hidden:
            self._hidden[1].close()
            self._hidden = None

    def trainer(
        self,
        dataset: Dataset,
        work: LocalWork,
        adapter: Arrays,
        *,
        head_start: str = "none",
        class_weights: str = "",
        secret: bytes = b"",
    ) -> Trainer:
        """A run that keeps within the resources; arguments as of :class:`Trainer`.

        Raises:
            TooLittleMemory: nothing fits the budget; says the least that would.
        """
        work = self.prepare(dataset, work)
        return Trainer(
            self.engine,
            dataset,
            work,
            adapter,
            memory=self.memory,
            hidden=self._cache(dataset),
            head_start=head_start,
            class_weights=class_weights,
            effects=partial(self._effects.of, dataset, work, pruned(adapter), memory=self.memory),
            expected_mb=self._expected_mb(dataset, work),
            secret=secret,
        )

    def evaluate(
        self,
        dataset: Dataset,
        adapter: Arrays,
        *,
        before_batch: Callable[[], object] = lambda: None,
        on_answers: OnAnswers = lambda answers, labels: None,
    ) -> Evaluation:
        """Measure an adapter within the resources; arguments as of :func:`evaluate`."""
        return evaluate(
            self.engine,
            dataset,
            adapter,
            memory=self.memory,
            before_batch=before_batch,
            on_answers=on_answers,
        )

    def class_sums(
        self,
        dataset: Dataset,
        work: LocalWork,
        adapter: Arrays,
        *,
        before_batch: Callable[[], object] = lambda: None,
    ) -> Arrays:
        """Sums for a class-mean head, of what ``work`` does not hold out; errors as :func:`class_sums`, and of ``work``.

        What flows into the lowest layer that ``work`` trains is kept in the hidden cache: the rounds that train find it there.
        """
        num_layers = self._artifact.manifest.num_layers
        check_work(work, num_layers)
        self.prepare(dataset, work)
        parts, cache = split(dataset, work.held_out), self._cache(dataset)
        return class_sums(
            self.engine,
            parts.training,
            pruned(adapter),
            batch_size=work.batch_size,
            memory=self.memory,
            before_batch=before_batch,
            hidden=(lambda rows: partial(cache.of, parts.kept[rows])) if cache else None,
            cache_below=first_boundary(work.policy, num_layers) if work.cache_below < 0 else work.cache_below,
        )

    def prepare(self, dataset: Dataset, work: LocalWork) -> LocalWork:
        """Return ``work`` with ``policy.drop`` raised if the budget needs it; set ``memory`` to what fits and its bound.

        Raises:
            TooLittleMemory: nothing fits the budget; says the least that would.
        """
        if not self._resources.memory_budget_mb:
            self.memory = self.memory._replace(micro_tokens=work.micro_tokens)
            return work
        self.fit = self._fit(dataset, work)
        log.info("memory budget of %g MB: %s", self._resources.memory_budget_mb, self.fit)
        self.memory = self.fit.memory
        policy = msgspec.structs.replace(work.policy, drop=self.fit.drop)
        return msgspec.structs.replace(work, policy=policy)

    def _expected_mb(self, dataset: Dataset, work: LocalWork) -> float:
        """Memory that a step of the run is expected to take at most; 0 if that is not known."""
        if self._resources.memory_budget_mb and self.fit:
            return self.fit.expected_mb
        if holds_whole_models(self._artifact.manifest):
            return 0.0
        rows = self.engine.rows(work.batch_size, dataset.mean_tokens, self.memory)
        return expected_mb(
            self._artifact,
            work,
            num_tokens=widest(dataset, self._artifact),
            memory=self.memory,
            resident_mb=self._held_before(),
            lanes=rows.lanes,
            num_steps=dataset.num_steps(work),
        )

    def _held_before(self) -> float:
        self._held_mb = self._held_mb or resident_mb()  # later it holds graphs and their memory too
        return self._held_mb

    def _fit(self, dataset: Dataset, work: LocalWork) -> Fit:
        return fit(
            self._artifact,
            work,
            num_tokens=widest(dataset, self._artifact),
            budget_mb=self._resources.memory_budget_mb,
            resident_mb=self._held_before(),
            num_steps=dataset.num_steps(work),
            count_lanes=lambda memory: self.engine.rows(work.batch_size, dataset.mean_tokens, memory).lanes,
        )

    def _cache(self, dataset: Dataset) -> HiddenCache | None:
        """One for this data set, kept from run to run."""
        if not self._resources.hidden_cache_mb:
            return None
        if self._hidden is None or self._hidden[0] != dataset.digest:
            if self._hidden:
                self._hidden[1].close()
            self._hidden = dataset.digest, self._new_cache(dataset, self._folder)
        return self._hidden[1]

    def _new_cache(self, dataset: Dataset, folder: Path) -> HiddenCache:
        is_ragged = any(isinstance(column, Ragged) for column in dataset.columns.values())
        limit_bytes = int(1e6 * self._resources.hidden_cache_mb)
        return HiddenCache(folder, lengths=dataset.lengths if is_ragged else None, limit_bytes=limit_bytes)


def widest(dataset: Dataset, artifact: Artifact) -> int:
    """Tokens of each row of the widest batch, padding included; 1 where rows are no sequences."""
    return num_tokens(dataset.rows(dataset.ordered_batches(1)[-1]), artifact.manifest.inputs) or 1


def pin(cores: str) -> int:
    """Let this process run on these cores only, as ``0-3,6``; returns how many.

    Raises:
        ConfigError: not a list of cores, cores that are not there, or a system that cannot.
    """
    try:
        chosen = {core for part in cores.split(",") for core in _range(part)}
    except ValueError as exc:
        raise ConfigError(f"cores {cores!r}: expected numbers and ranges, as 0-3,6") from exc
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(f"cores {cores!r}: this system cannot pin a process")
    have = os.sched_getaffinity(0)
    if missing := sorted(chosen - have):
        raise ConfigError(f"cores {cores!r}: no core {', '.join(map(str, missing))}; have: {sorted(have)}")
    os.sched_setaffinity(0, chosen)
    return len(chosen)


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found:
        raise ValueError(part)
    return found


def _check(resources: Resources) -> None:
    found = problems(resources)
    if resources.memory_budget_mb and (resources.recompute or resources.stream):
        found.append("give a memory budget, or recompute and stream: the budget chooses both")
    refuse(found)
