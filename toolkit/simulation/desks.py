"""What a virtual device works with: its runs are workers', its memory its profile's, and its clock the virtual one."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from math import inf
from typing import NamedTuple

from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.class_means import COUNTS
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.work import CLASS_MEANS, LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.errors import TooLittleMemory
from fleetune.toolkit.simulation.availability import Interruption
from fleetune.toolkit.simulation.calls import CacheModel
from fleetune.toolkit.simulation.costs import Costs
from fleetune.toolkit.simulation.jobs import Done, Share, Task
from fleetune.toolkit.simulation.memory import MemoryModel
from fleetune.toolkit.simulation.runs import Begun, Runs
from fleetune.toolkit.simulation.virtual_run import Account, VirtualRun

CHECKPOINT_STEPS = 20
"""A device that was gone goes on from its last step that is a multiple of this, as ``fleetune device`` does."""


class Equipment(NamedTuple):
    """What all desks of a simulation share."""

    artifact: Artifact
    runs: Runs
    costs: Costs
    datasets: Callable[[Share, int], Dataset]
    """(share, longest sequence) -> its samples."""
    memory: MemoryModel
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
        memory_mb: float = inf,
        pause: Callable[[int], Interruption | None] = lambda _: None,
        on_start: Callable[[Started], object] = lambda _: None,
        on_known: Callable[[Started], object] = lambda _: None,
        on_spent: Callable[[float], object] = lambda _: None,
        instead: Callable[[Workbench], Workbench] = lambda workbench: workbench,
        secret: bytes = b"",
    ) -> None:
        """Prepare.

        Args:
            equipment: what all share.
            name: of the device.
            share: its samples.
            num_samples: how many.
            slowdown: its step time over this machine's on one thread.
            hidden_cache_mb: disk for its hidden cache; 0 for none.
            memory_mb: memory that it has for training, in 10^6 bytes.
            pause: round -> its pause in that round's work.
            on_start: told of each run.
            on_known: told of it again when its end is known.
            on_spent: told of seconds that it computes without a run.
            instead: its workbench -> the one that its agent gets.
            secret: what work that hides samples draws from.
        """
        self.current: Started | None = None
        """The run at work, or the last one."""
        self.busy_until = -inf
        """End of what it does without a run: until then it says nothing."""
        self._equipment, self._name, self._share = equipment, name, share
        self._num_samples, self._slowdown = num_samples, slowdown
        self._hidden_cache_mb, self._memory_mb, self._pause = hidden_cache_mb, memory_mb, pause
        self._on_start, self._on_known, self._on_spent = on_start, on_known, on_spent
        self._instead, self._secret = instead, secret
        self._ahead: tuple[str, Begun] | None = None
        self._begun: Begun | None = None
        self._files: dict[str, bytes] = {}
        self._key, self._kept_steps = "", 0
        self._cache = CacheModel(
            limit_bytes=int(1e6 * hidden_cache_mb), width=equipment.artifact.manifest.hidden_size
        )

    def workbench(self) -> Workbench:
        """What an agent works with."""
        own = Workbench(
            self._begin,
            self._measure,
            self._num_samples,
            self._class_sums,
            histogram=self._histogram,
        )
        return self._instead(own)

    @property
    def ends_at(self) -> float:
        """When the run at work is done, or a time before; -inf if there is none."""
        return self.current.run.ends_at if self.current else -inf

    def begin_ahead(self, work: LocalWork, adapter: Arrays) -> None:
        """Have workers begin what the device will most likely be asked to do; nothing comes of it otherwise."""
        with suppress(TooLittleMemory):  # which it will say itself
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

    def _histogram(self) -> tuple[int, ...]:
        assert self.current  # it is told with what came of a run
        return self._equipment.datasets(self._share, self.current.work.seq_len).histogram()

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
            pause=self._pause(work.rounds_before + 1),
            measure=lambda measured: self._held_out(work, measured),
            on_known=lambda _: self._on_known(started),
        )
        self.current = started = Started(work, run)
        self._on_start(started)
        return run

    def _class_sums(self, work: LocalWork, adapter: Arrays) -> tuple[Arrays, Mapping[str, float]]:
        done, seconds = self._at_once(self._task(work, adapter, kind=CLASS_MEANS))
        sums = parse_arrays(done.adapter)
        return sums, {"seconds": seconds, "samples": float(sums[COUNTS].sum())}

    def _held_out(self, work: LocalWork, adapter: Arrays) -> Done | None:
        done, _ = self._at_once(self._task(work, adapter, kind="held-out"))
        return done if done.num_samples else None

    def _measure(self, work: LocalWork, adapter: Arrays) -> Done:
        return self._at_once(self._task(work, adapter, kind="evaluate"))[0]

    def _at_once(self, task: Task) -> tuple[Done, float]:
        """Do what an agent waits for in one go: the device says nothing before its time is over; with the engine's seconds."""
        done = self._submit(task).wait()
        account = self._account(done, task.work, is_round=task.kind == CLASS_MEANS)
        seconds = account.rest + account.beside
        self.busy_until = max(self.busy_until, self._equipment.clock()) + seconds
        self._on_spent(seconds)
        return done.check(), account.rest

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
            if self.current:
                self.current.run.settle()
            self._begun.cancel()
        self._begun = None

    def _task(self, work: LocalWork, adapter: Arrays, *, kind: str = "") -> Task:
        work, memory = self._fitted(work)
        return Task(
            kind=kind or (CLASS_MEANS if work.learns == CLASS_MEANS else "train"),
            device=self._name,
            share=self._share,
            work=work,
            adapter=to_bytes(adapter),
            hidden_cache_mb=self._hidden_cache_mb,
            files=self._files,
            memory=memory,
            secret=self._secret if work.hides_samples else b"",
        )

    def _fitted(self, work: LocalWork) -> tuple[LocalWork, MemoryPlan]:
        data = partial(self._equipment.datasets, self._share, work.seq_len)
        return self._equipment.memory.fit(work, data, self._memory_mb)

    def _account(self, done: Done, work: LocalWork, *, is_round: bool = True) -> Account:
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
        beside = self._slowdown * self._equipment.costs.beside_s(len(steps)) if is_round else 0.0
        return Account(steps, rest, self._equipment.memory.peak_mb(done.calls), beside)
