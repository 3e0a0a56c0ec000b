"""Spreads over time what many devices have reason to do in the same moment."""

from hashlib import sha256

from fleetune.device_runtime.draws import Key, uniform


class Jitter:
    """Draws of one device: no two devices have the same, and the n-th of one is always the same."""

    def __init__(self, device_id: str) -> None:
        self._seed = int.from_bytes(sha256(device_id.encode()).digest()[:6])
        self._count = 0

    def within(self, seconds: float) -> float:
        """A time from 0 to ``seconds``."""
        number, self._count = self._count, (self._count + 1) % 2**32
        return seconds * uniform(Key(self._seed, "jitter", number))

    def around(self, seconds: float) -> float:
        """A time from three quarters of ``seconds`` to all of them."""
        return seconds - self.within(seconds / 4)
