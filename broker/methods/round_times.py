"""What a round is expected to take a device: transfers over its link, and training, as both were seen before."""

from typing import NamedTuple

from fleetune.broker.methods.seen import Seen, samples_of
from fleetune.device_runtime.contracts.work import LocalWork


class Pace(NamedTuple):
    """Seconds of one round."""

    carried_s: float
    """Down and up; 0 where the link is not known."""
    trained_s: float

    @property
    def total_s(self) -> float:
        """All together."""
        return self.carried_s + self.trained_s


def pace(seen: Seen | None, work: LocalWork, *, bytes_down: float, bytes_up: float) -> Pace | None:
    """What work and its transfers take a device; None where its training was never seen."""
    if seen is None or not seen.sample_s:
        return None
    down_s = bytes_down / seen.down if seen.down else 0.0
    up_s = bytes_up / seen.up if seen.up else 0.0
    return Pace(down_s + up_s, seen.sample_s * samples_of(work, seen.num_samples))
