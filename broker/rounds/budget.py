"""How many rounds each device's data may still be in: what a job's most epsilon comes to."""

from collections import Counter
from collections.abc import Mapping


class Budget:
    """Counts rounds by device; every question takes the same time however many devices there are."""

    def __init__(self, rounds_max: int | None, turns: Mapping[str, int]) -> None:
        """Begin with the ``turns`` that devices have had; ``rounds_max`` None is no limit."""
        self._max, self._turns = rounds_max, Counter(turns)
        self._seen = set(turns)
        self.num_spent = sum(self.is_spent(device) for device in turns)
        """Devices that may be asked no more."""

    @property
    def num_left(self) -> int:
        """Devices that were here and may be asked again."""
        return len(self._seen) - self.num_spent

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
