"""What a device computes in virtual time, each second once: in the round in which it passes, whatever the work was for."""

from fleetune.toolkit.simulation.virtual_run import VirtualRun


class Working:
    """One device's."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._run: VirtualRun | None = None
        self._taken = self._owed = 0.0

    def begin(self, run: VirtualRun, now: float) -> None:
        """It begins a run, and gives up the one before."""
        self.stop(now)
        self._run = run

    def stop(self, now: float) -> None:
        """It computes no more."""
        self._owed, self._run, self._taken = self._owed + self._since(now), None, 0.0

    def add(self, seconds: float) -> None:
        """It has computed without a run."""
        self._owed += seconds

    def take(self, now: float) -> float:
        """Return the seconds since the last time."""
        since = self._since(now)
        seconds, self._owed = self._owed + since, 0.0
        self._taken += since
        return seconds

    def _since(self, now: float) -> float:
        return self._run.compute_s(now) - self._taken if self._run else 0.0
