"""How many rounds each device's data may still be in: what a job's most epsilon comes to."""

from collections import Counter
from collections.abc import Mapping

from fleetune.broker.jobs.settings import Settings


class Budget:
    """Counts rounds by device; every question takes the same time however many devices there are."""

    def __init__(self, rounds_max: int | None, turns: Mapping[str, int]) -> None:
        """Begin with the ``turns`` that devices have had; ``rounds_max`` None is no limit."""
        self._max, self._turns = rounds_max, Counter(turns)
        self._seen = set(turns)
        self._newly = {device for device in turns if self.is_spent(device)}
        self.num_spent = len(self._newly)
        """Devices that may be asked no more."""

    @property
    def num_left(self) -> int:
        """Devices that were here and may be asked again."""
        return len(self._seen) - self.num_spent

    def runs_out(self, least: int) -> bool:
        """Whether fewer devices than ``least`` may be asked again, as far as is known."""
        return bool(self.num_spent) and self.num_left < least

    def see(self, device: str) -> None:
        """A device is here to train."""
        self._seen.add(device)

    def is_spent(self, device: str) -> bool:
        """Whether a further round of a device would exceed what the job allows."""
        return self._max is not None and self._turns[device] >= self._max

    def take(self, device: str, turns: int = 1) -> None:
        """A device is asked; or, with -1, has declined."""
        self._seen.add(device)
        self.num_spent -= self.is_spent(device)
        self._turns[device] += turns
        self.num_spent += self.is_spent(device)
        (self._newly.add if self.is_spent(device) else self._newly.discard)(device)

    def take_newly_spent(self) -> set[str]:
        """Return the devices that may be asked no more, once each."""
        found, self._newly = self._newly, set()
        return found


def why_ended(budget: Budget, settings: Settings) -> str:
    """Say why a job that may ask too few devices again ends early."""
    return (
        f"{budget.num_left} devices may be asked again, and a round needs {settings.min_clients}: "
        f"with another, epsilon would exceed {settings.dp.most_epsilon:g}"
    )
