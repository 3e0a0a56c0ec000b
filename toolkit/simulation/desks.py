"""What a virtual device works with: workers do its runs while the virtual clock stands; it has them when their time is over."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import NamedTuple

from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.class_means import COUNTS
from fleetune.device_runtime.contracts.wire import CLASS_MEANS, LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.footprint import footprint, holds_whole_models
from fleetune.toolkit.simulation.calls import CacheModel, Call
from fleetune.toolkit.simulation.costs import Costs
from fleetune.toolkit.simulation.jobs import Done, Share, Task
from fleetune.toolkit.simulation.runs import Begun, Runs

CHECKPOINT_STEPS = 20
"""A device that was gone goes on from its last step that is a multiple of this, as ``fleetune device`` does."""


class Made(NamedTuple):
    """A step of a virtual run."""

    loss: float
    active_layers: int
    seconds: float
    """Virtual."""


class Account(NamedTuple):
    """A run in virtual seconds."""

    steps: list[float]
    rest: float
    """What else it asked of the engine: measuring, class means."""
    peak_mb: float
    """Expected, in 10^6 bytes."""


class VirtualRun:
    """A :class:`fleetune.device_runtime.agent.trainer_port.Training` that is done when its virtual time is over.

    How long it takes is known when the worker is done. Until it must be known the virtual clock goes on, so that other devices
    begin too: to ``begins_at`` and the least time that such work takes.
    """

    def __init__(
        self,
        start: Arrays,
        *,
        wait: Callable[[], Done],
        account: Callable[[Done], Account],
        clock: Callable[[], float],
        least_s: float,
        skipped: int = 0,
        delay_s: float = 0.0,
        measure: Callable[[Arrays], Done | None] = lambda _: None,
        on_known: Callable[["VirtualRun"], object] = lambda _: None,
    ) -> None:
        """Begin.

        Args:
            start: the adapter that it starts from.
            wait: gives what came of the run; blocks.
            account: its virtual times.
            clock: virtual time.
            least_s: it takes at least so long.
            skipped: steps that were done before the device was gone.
            delay_s: how long it pauses.
            measure: an adapter on what the work holds out; None if it holds out nothing.
            on_known: called once, when its end is known.
        """
        self.measure = measure
        self.begins_at, self.skipped = clock(), skipped
        self._start, self._wait, self._to_account, self._clock = start, wait, account, clock
        self._least_s, self._delay_s, self._on_known = least_s, delay_s, on_known
        self._known: tuple[Done, Account] | None = None
        self._sums: list[float] = []

    @property
    def ends_at(self) -> float:
        """Its end; or as long as that need not be known, a time before it."""
        least = self.begins_at + self._least_s
        if self._known is None and self._clock() < least:
            return least
        return max(least, self.begins_at + self._all_s + self._delay_s)

    @property
    def done(self) -> bool:
        """Whether its time is over."""
        return self._clock() >= self.ends_at

    @property
    def account(self) -> Account:
        """Its virtual times."""
        return self._result()[1]

    @property
    def step_index(self) -> int:
        """Steps done."""
        return self.steps_by(self._clock())

    def steps_by(self, now: float) -> int:
        """Steps done at a time; what is no step, and a pause, count as if they came last."""
        self._result()
        return self.skipped + bisect_right(self._sums, now - self.begins_at)

    def compute_s(self, now: float) -> float:
        """Virtual seconds that it has computed by then."""
        return min(now - self.begins_at, self._all_s)

    @property
    def history(self) -> list[Made]:
        """What every step reported, in virtual seconds; raises what kept the run from being done."""
        done, account = self._result()
        done.check()
        return [Made(*row) for row in zip(done.losses, done.active_layers, account.steps, strict=True)]

    @property
    def adapter(self) -> Arrays:
        """The tensors as trained; raises as ``history``."""
        return {**self._start, **parse_arrays(self._result()[0].check().adapter)}

    @property
    def stats(self) -> Mapping[str, float]:
        """More figures of the run, those of time and memory virtual; raises as ``history``."""
        done, account = self._result()
        held = {"held_seconds": account.rest} if "held_samples" in done.stats else {}
        return done.check().stats | held | {"peak_mb": account.peak_mb}

    @property
    def importance(self) -> Sequence[float]:
        """Of each layer; raises as ``history``."""
        return self._result()[0].check().importance

    @property
    def personal(self) -> Sequence[str]:
        """Names of the tensors that stay on the device; raises as ``history``."""
        return self._result()[0].check().personal

    def step(self) -> Made:
        """Pass the time."""
        return Made(0.0, 0, 0.0)

    def save(self, path: Path) -> None:
        """Do nothing: the desk knows how far a run was."""

    def restore(self, path: Path) -> None:
        """Do nothing, as ``save``."""

    @property
    def _all_s(self) -> float:
        account = self.account
        return (self._sums[-1] if self._sums else 0.0) + account.rest

    def _result(self) -> tuple[Done, Account]:
        if self._known is None:
            done = self._wait()
            self._known = done, self._to_account(done)
            self._sums = list(accumulate(self._known[1].steps[self.skipped :]))
            self._on_known(self)
        return self._known


class Equipment(NamedTuple):
    """What all desks of a simulation share."""

    artifact: Artifact
    runs: Runs
    costs: Costs
    datasets: Callable[[Share, int], Dataset]
    """(share, longest sequence) -> its samples."""
    clock: Callable[[], float]


class Started(NamedTuple):
    """A run that a device has begun."""

    work: LocalWork
    run: VirtualRun


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
        on_known: Callable[[Started], object] = lambda _: None,
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
            on_known: told of it again when its end is known.
        """
        self.current: Started | None = None
        """The run at work, or the last one."""
        self.busy_until = -inf
        """End of what it does without a run: until then it says nothing."""
        self._equipment, self._name, self._share = equipment, name, share
        self._num_samples, self._slowdown = num_samples, slowdown
        self._hidden_cache_mb, self._pause_s = hidden_cache_mb, pause_s
        self._on_start, self._on_known = on_start, on_known
        self._ahead: tuple[str, Begun] | None = None
        self._begun: Begun | None = None
        self._files: dict[str, bytes] = {}
        self._key, self._kept_steps = "", 0
        self._cache = CacheModel(
            limit_bytes=int(1e6 * hidden_cache_mb), width=equipment.artifact.manifest.hidden_size
        )

    def workbench(self) -> Workbench:
        """What an agent works with."""
        return Workbench(self._begin, self._measure, self._num_samples, self._class_sums)

    @property
    def ends_at(self) -> float:
        """When the run at work is done, or a time before; -inf if there is none."""
        return self.current.run.ends_at if self.current else -inf

    def begin_ahead(self, work: LocalWork, adapter: Arrays) -> None:
        """Have workers begin what the device will most likely be asked to do; nothing comes of it otherwise."""
        task = self._task(work, adapter)
        self._ahead = task.key, self._equipment.runs.begin(task)

    def power_off(self, now: float) -> None:
        """Lose the run at work, but for its last checkpoint, and the hidden cache."""
        if self.current and now < self.ends_at:
            done = self.current.run.steps_by(now)
            self._kept_steps = done - done % CHECKPOINT_STEPS
            self._abandon()
        self._cache.clear()
        self.current, self.busy_until = None, -inf

    def _begin(self, work: LocalWork, adapter: Arrays) -> VirtualRun:
        task = self._task(work, adapter)
        skipped = self._kept_steps if task.key == self._key else 0
        self._key, self._kept_steps = task.key, 0
        begun = self._submit(task)
        run = VirtualRun(
            adapter,
            wait=begun.wait,
            account=lambda done: self._account(done, work),
            clock=self._equipment.clock,
            least_s=self._slowdown * self._equipment.costs.least_s(work, self._num_samples),
            skipped=skipped,
            delay_s=self._pause_s(work.rounds_before + 1),
            measure=lambda measured: self._held_out(work, measured),
            on_known=lambda _: self._on_known(started),
        )
        self.current = started = Started(work, run)
        self._on_start(started)
        return run

    def _class_sums(self, work: LocalWork, adapter: Arrays) -> tuple[Arrays, Mapping[str, float]]:
        begun_at = max(self.busy_until, self._equipment.clock())
        sums = parse_arrays(self._at_once(self._task(work, adapter, kind=CLASS_MEANS)).adapter)
        return sums, {"seconds": self.busy_until - begun_at, "samples": float(sums[COUNTS].sum())}

    def _held_out(self, work: LocalWork, adapter: Arrays) -> Done | None:
        done = self._at_once(self._task(work, adapter, kind="held-out"))
        return done if done.num_samples else None

    def _measure(self, work: LocalWork, adapter: Arrays) -> Done:
        return self._at_once(self._task(work, adapter, kind="evaluate"))

    def _at_once(self, task: Task) -> Done:
        """Do what an agent waits for in one go: the device says nothing before its time is over."""
        done = self._submit(task).wait()
        self.busy_until = max(self.busy_until, self._equipment.clock()) + self._account(done, task.work).rest
        return done.check()

    def _submit(self, task: Task) -> Begun:
        self._abandon()
        is_ahead = self._ahead is not None and self._ahead[0] == task.key
        self._begun = self._ahead[1] if is_ahead and self._ahead else self._equipment.runs.begin(task)
        if self._ahead and not is_ahead:
            self._ahead[1].cancel()
        self._ahead = None
        return self._begun

    def _abandon(self) -> None:
        if self._begun:
            self._begun.cancel()
        self._begun = None

    def _task(self, work: LocalWork, adapter: Arrays, *, kind: str = "") -> Task:
        return Task(
            kind=kind or (CLASS_MEANS if work.learns == CLASS_MEANS else "train"),
            device=self._name,
            share=self._share,
            work=work,
            adapter=to_bytes(adapter),
            hidden_cache_mb=self._hidden_cache_mb,
            files=self._files,
        )

    def _account(self, done: Done, work: LocalWork) -> Account:
        """Work out what a run takes here, and take over what the device keeps of it."""
        self._files = done.files
        dataset = self._equipment.datasets(self._share, work.seq_len)
        shares = self._cache.hit_shares(done.calls, dataset.lengths)
        timed = [
            (call, self._slowdown * self._equipment.costs.call_s(call, hit_share=share))
            for call, share in zip(done.calls, shares, strict=True)
        ]
        steps = [seconds for call, seconds in timed if call.is_step]
        rest = sum(seconds for call, seconds in timed if not call.is_step)
        return Account(steps, rest, peak_mb(self._equipment.artifact, done.calls))


def peak_mb(artifact: Artifact, calls: Sequence[Call]) -> float:
    """Expected peak of a run in 10^6 bytes: that of its deepest step; 0 without one, or where the artifact does not tell."""
    manifest = artifact.manifest
    steps = [call for call in calls if call.is_step]
    if not steps or holds_whole_models(manifest):
        return 0.0
    ways = {(call.plan, call.gates, call.cache_below): (call, call.way(manifest)) for call in steps}
    deepest, _ = max(ways.values(), key=lambda pair: (len(pair[1].layers), len(pair[1].back)))
    found = footprint(
        artifact,
        deepest.layer_plan,
        batch_size=max(call.rows for call in steps),
        seq_len=max(call.tokens // call.rows for call in steps),
        also_read={layer for _, way in ways.values() for layer in way.layers},
    )
    return found.peak / 1e6
