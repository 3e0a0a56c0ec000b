"""A run on a virtual device: workers do it while the virtual clock stands; it is done when its virtual time is over."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from fleetune.device_runtime.arrays import Arrays, parse_arrays
from fleetune.toolkit.simulation.availability import Interruption
from fleetune.toolkit.simulation.jobs import Done


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
    beside: float = 0.0
    """What the device does beside the engine's work: taking the version, keeping and packing what came of it."""


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
        pause: Interruption | None = None,
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
            pause: when it pauses, and for how long; None if it does not.
            measure: an adapter on what the work holds out; None if it holds out nothing.
            on_known: called once, when its end is known.
        """
        self.measure = measure
        self.begins_at, self.skipped = clock(), skipped
        self._start, self._wait, self._to_account, self._clock = start, wait, account, clock
        self._least_s, self._pause, self._on_known = least_s, pause, on_known
        self._known: tuple[Done, Account] | None = None
        self._sums: list[float] = []

    @property
    def ends_at(self) -> float:
        """Its end; or as long as that need not be known, a time before it."""
        least = self.begins_at + self._least_s
        if self._known is None and self._clock() < least:
            return least
        return max(least, self.begins_at + self._all_s + self._pause_s)

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
        """Steps done at a time; what is no step counts as if it came last."""
        return self.skipped + bisect_right(self._sums, self._worked_s(now))

    def compute_s(self, now: float) -> float:
        """Virtual seconds that it has computed by then."""
        return min(self._worked_s(now), self._all_s)

    def settle(self) -> None:
        """Wait until it is known how long it takes: nobody may be able to tell later."""
        self._result()

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
    def effective_samples(self) -> float:
        """Without bound: nobody asks, a simulated device has no contract."""
        return float("inf")

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
        return (self._sums[-1] if self._sums else 0.0) + account.rest + account.beside

    @property
    def _pause_s(self) -> float:
        return self._pause.seconds if self._pause else 0.0

    def _worked_s(self, now: float) -> float:
        """Time that it has had by then, its pause taken out."""
        passed, starts = now - self.begins_at, self._pause.at * self._all_s if self._pause else 0.0
        return passed if passed <= starts else max(starts, passed - self._pause_s)

    def _result(self) -> tuple[Done, Account]:
        if self._known is None:
            done = self._wait()
            self._known = done, self._to_account(done)
            self._sums = list(accumulate(self._known[1].steps[self.skipped :]))
            self._on_known(self)
        return self._known
