"""What a virtual device works with: workers do its runs while the virtual clock stands; it has them when their time is over."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.agent.trainer_port import Measured, Workbench
from fleetune.device_runtime.arrays import Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.wire import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.footprint import footprint, holds_whole_models
from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.simulation.bench import Latest
from fleetune.toolkit.simulation.costs import Costs
from fleetune.toolkit.simulation.jobs import Done, Share, Task
from fleetune.toolkit.simulation.runs import Begun, Runs
from fleetune.toolkit.simulation.schedule import CacheModel, Step, schedule

CHECKPOINT_STEPS = 20
"""A device that was gone goes on from its last step that is a multiple of this, as ``fleetune device`` does."""


class Made(NamedTuple):
    """A step of a virtual run."""

    loss: float
    active_layers: int
    seconds: float
    """Virtual."""


class VirtualRun:
    """A :class:`fleetune.device_runtime.agent.trainer_port.Training` that is done when its virtual time is over."""

    def __init__(
        self,
        seconds: Sequence[float],
        *,
        skipped: int,
        delay_s: float,
        start: Arrays,
        wait: Callable[[], Done],
        clock: Callable[[], float],
    ) -> None:
        """Begin.

        Args:
            seconds: of each step, virtual.
            skipped: steps that were done before the device was gone.
            delay_s: how long it pauses.
            start: the adapter that it starts from.
            wait: gives what came of the run; blocks.
            clock: virtual time.
        """
        self.seconds, self.skipped = list(seconds), skipped
        self.begins_at = clock()
        self._sums = list(accumulate(self.seconds[skipped:]))
        self.ends_at = self.begins_at + (self._sums[-1] if self._sums else 0.0) + delay_s
        self._start, self._wait, self._clock = start, wait, clock
        self._done: Done | None = None

    @property
    def done(self) -> bool:
        """Whether its time is over."""
        return self._clock() >= self.ends_at

    @property
    def step_index(self) -> int:
        """Steps done."""
        return len(self.seconds) if self.done else self.steps_by(self._clock())

    def steps_by(self, now: float) -> int:
        """Steps done at a time; a pause counts as if it came last."""
        return self.skipped + bisect_right(self._sums, now - self.begins_at)

    def compute_s(self, now: float) -> float:
        """Virtual seconds that it has computed by then."""
        return min(now - self.begins_at, self._sums[-1] if self._sums else 0.0)

    @property
    def history(self) -> list[Made]:
        """What every step reported, in virtual seconds; raises what kept the run from being done."""
        done = self._result()
        rows = zip(done.losses, done.active_layers, self.seconds, strict=True)
        return [Made(*row) for row in rows]

    @property
    def adapter(self) -> Arrays:
        """The tensors as trained; raises as ``history``."""
        return {**self._start, **parse_arrays(self._result().adapter)}

    @property
    def stats(self) -> Mapping[str, float]:
        """More figures of the run; raises as ``history``."""
        return self._result().stats

    @property
    def importance(self) -> Sequence[float]:
        """Of each layer; raises as ``history``."""
        return self._result().importance

    def step(self) -> Made:
        """Pass the time."""
        return Made(0.0, 0, 0.0)

    def save(self, path: Path) -> None:
        """Do nothing: the desk knows how far a run was."""

    def restore(self, path: Path) -> None:
        """Do nothing, as ``save``."""

    def _result(self) -> Done:
        if self._done is None:
            self._done = self._wait()
        return self._done.check()


class Equipment(NamedTuple):
    """What all desks of a simulation share."""

    artifact: Artifact
    runs: Runs
    costs: Costs
    datasets: Callable[[Share, int], Dataset]
    """(share, longest sequence) -> its samples."""
    clock: Callable[[], float]
    layers: Callable[[bytes], Mapping[int, str]]
    """Adapter file -> digest of each layer's tensors in it."""


class Started(NamedTuple):
    """A run that a device has begun."""

    work: LocalWork
    run: VirtualRun
    peak_mb: float


class Desk:
    """One device's."""

    def __init__(
        self,
        equipment: Equipment,
        name: str,
        share: Share,
        *,
        num_samples: int,
        slowdown: float,
        hidden_cache_mb: float = 0.0,
        pause_s: Callable[[int], float] = lambda _: 0.0,
        on_start: Callable[[Started], object] = lambda _: None,
    ) -> None:
        """Prepare.

        Args:
            equipment: what all share.
            name: of the device.
            share: its samples.
            num_samples: how many.
            slowdown: its step time over this machine's on one thread.
            hidden_cache_mb: disk for its hidden cache; 0 for none.
            pause_s: round -> how long it pauses in that round's work.
            on_start: told of each run.
        """
        self.current: Started | None = None
        """The run at work, or the last one."""
        self._equipment, self._name, self._share = equipment, name, share
        self._num_samples, self._slowdown = num_samples, slowdown
        self._hidden_cache_mb, self._pause_s, self._on_start = hidden_cache_mb, pause_s, on_start
        self._begun: Begun | None = None
        self._key, self._kept_steps = "", 0
        self._cache = CacheModel(
            limit_bytes=int(1e6 * hidden_cache_mb), width=equipment.artifact.manifest.hidden_size
        )

    def workbench(self) -> Workbench:
        """What an agent works with."""
        return Workbench(self._begin, _no_evaluation, self._num_samples)

    @property
    def ends_at(self) -> float:
        """When the run at work is done; -inf if there is none."""
        return self.current.run.ends_at if self.current else -inf

    def power_off(self, now: float) -> None:
        """Lose the run at work, but for its last checkpoint, and the hidden cache."""
        self._cache.clear()
        if self.current and now < self.ends_at:
            done = self.current.run.steps_by(now)
            self._kept_steps = done - done % CHECKPOINT_STEPS
            self._abandon()
        self.current = None

    def _begin(self, work: LocalWork, adapter: Arrays) -> VirtualRun:
        content = to_bytes(adapter)
        task = Task(
            kind="train",
            device=self._name,
            share=self._share,
            work=work,
            adapter=content,
            hidden_cache_mb=self._hidden_cache_mb,
        )
        skipped = self._kept_steps if task.key == self._key else 0
        self._abandon()
        self._begun = begun = self._equipment.runs.begin(task)
        self._key, self._kept_steps = task.key, 0
        dataset = self._equipment.datasets(self._share, work.seq_len)
        steps = schedule(work, dataset, self._equipment.artifact.manifest)
        run = VirtualRun(
            self._seconds(steps, work, dataset, content),
            skipped=skipped,
            delay_s=self._pause_s(work.rounds_before + 1),
            start=adapter,
            wait=begun.wait,
            clock=self._equipment.clock,
        )
        self.current = Started(work, run, peak_mb(self._equipment.artifact, steps, work))
        self._on_start(self.current)
        return run

    def _abandon(self) -> None:
        if self._begun:
            self._begun.cancel()
        self._begun = None

    def _seconds(self, steps: list[Step], work: LocalWork, dataset: Dataset, adapter: bytes) -> list[float]:
        shares = [0.0] * len(steps)
        if self._hidden_cache_mb:
            shares = [*self._cache.hit_shares(steps, dataset, self._equipment.layers(adapter))]
        cost = partial(self._equipment.costs.step_s, cache_below=work.cache_below)
        return [self._slowdown * cost(step, hit_share=s) for step, s in zip(steps, shares, strict=True)]


def peak_mb(artifact: Artifact, steps: list[Step], work: LocalWork) -> float:
    """Expected peak of a run in 10^6 bytes: that of its deepest step; 0 where the artifact does not tell."""
    if not steps or holds_whole_models(artifact.manifest):
        return 0.0
    deepest = max(steps, key=lambda step: (len(step.way.layers), len(step.way.back)))
    found = footprint(
        artifact,
        deepest.plan,
        batch_size=max(len(step.examples) for step in steps),
        seq_len=max(step.width for step in steps),
        also_read={layer for step in steps for layer in step.way.layers},
    )
    return found.peak / 1e6


def layer_digests(artifact: Artifact) -> Callable[[bytes], Mapping[int, str]]:
    """Make what says of an adapter file which tensors each layer has in it."""
    manifest = artifact.manifest
    names = {
        i: sorted(manifest.tensors[t].name for t in layer.tensors if manifest.tensors[t].trainable)
        for i, layer in enumerate(manifest.layers)
    }
    latest: Latest[Mapping[int, str]] = Latest(2)

    def of(content: bytes) -> Mapping[int, str]:
        return latest.get(sha256(content).digest(), lambda: made(parse_arrays(content)))

    def made(arrays: Arrays) -> Mapping[int, str]:
        return {i: _digest([arrays[name] for name in some]) for i, some in names.items()}

    return of


def _digest(arrays: Sequence[np.ndarray]) -> str:
    return sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _no_evaluation(work: LocalWork, adapter: Arrays) -> Measured:
    raise ConfigError("virtual devices train; the simulator evaluates")
