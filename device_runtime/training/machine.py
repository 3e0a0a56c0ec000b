"""This machine as a run may use it: cores, provider, memory. Opens an artifact's stack and fits each run to what there is."""

import logging
import os
from pathlib import Path

import msgspec

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.wire import LocalWork
from fleetune.device_runtime.data.samples import Dataset, Ragged
from fleetune.device_runtime.engine.batches import num_tokens
from fleetune.device_runtime.engine.hidden_cache import PrefixCache
from fleetune.device_runtime.engine.runtimes import open_stack
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.options import problems, refuse
from fleetune.device_runtime.training.budget import Fit, fit, resident_mb
from fleetune.device_runtime.training.trainer import Trainer

log = logging.getLogger(__name__)


class Machine:
    """An opened stack, and the cached prefix of one data set at a time."""

    def __init__(self, artifact: Artifact, resources: Resources, *, folder: Path) -> None:
        """Pin the process to its cores and open the stack.

        Args:
            artifact: an opened artifact.
            resources: what may be used.
            folder: where the cached prefix lies while this is open.

        Raises:
            ConfigError: a number out of range, cores or a provider that are not there, or a budget beside what it would choose.
        """
        _check(resources)
        pinned = pin(resources.cores) if resources.cores else 0
        self.stack = open_stack(
            artifact,
            threads=resources.threads or pinned,
            memory=MemoryPlan(saved_layers=0 if resources.recompute else None, streamed=resources.stream),
            provider=resources.provider,
        )
        self.fit: Fit | None = None
        """What the budget came to for the last run; None without one."""
        self._artifact, self._resources, self._folder = artifact, resources, folder
        self._prefix: tuple[str, PrefixCache] | None = None
        self._held_mb = 0.0

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the stack and remove the cached prefix."""
        self.stack.close()
        if self._prefix:
            self._prefix[1].close()
            self._prefix = None

    def trainer(self, dataset: Dataset, work: LocalWork, adapter: Arrays) -> Trainer:
        """A run that keeps within the resources; arguments as of :class:`Trainer`.

        Raises:
            ConfigError: nothing fits the budget; says the least that would.
        """
        work = self.prepare(dataset, work)
        return Trainer(self.stack, dataset, work, adapter, prefix=self._cache(dataset))

    def prepare(self, dataset: Dataset, work: LocalWork) -> LocalWork:
        """Have the stack keep within the budget for ``work``, evaluation included; returns the work as it can be done.

        Raises:
            ConfigError: nothing fits the budget; says the least that would.
        """
        if not self._resources.memory_budget_mb:
            return work
        self.fit = self._fit(dataset, work)
        log.info("memory budget of %g MB: %s", self._resources.memory_budget_mb, self.fit)
        self.stack.use(self.fit.memory)
        policy = msgspec.structs.replace(work.policy, drop=self.fit.drop)
        return msgspec.structs.replace(work, policy=policy)

    def _fit(self, dataset: Dataset, work: LocalWork) -> Fit:
        self._held_mb = self._held_mb or resident_mb()  # later it holds graphs and their memory too
        return fit(
            self._artifact,
            work,
            num_tokens=_widest(dataset, self._artifact),
            budget_mb=self._resources.memory_budget_mb,
            resident_mb=self._held_mb,
            count_lanes=self.stack.count_lanes,
        )

    def _cache(self, dataset: Dataset) -> PrefixCache | None:
        """One for this data set, kept from run to run."""
        if not self._resources.prefix_cache_mb:
            return None
        if self._prefix is None or self._prefix[0] != dataset.digest:
            if self._prefix:
                self._prefix[1].close()
            ragged = any(isinstance(column, Ragged) for column in dataset.columns.values())
            limit_bytes = int(1e6 * self._resources.prefix_cache_mb)
            cache = PrefixCache(
                self._folder, lengths=dataset.lengths if ragged else None, limit_bytes=limit_bytes
            )
            self._prefix = dataset.digest, cache
        return self._prefix[1]


def _widest(dataset: Dataset, artifact: Artifact) -> int:
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
