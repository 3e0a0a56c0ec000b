"""Says in a line which devices' updates come slowly, more than once, or not at all as their connections break."""

import logging
from typing import NamedTuple

log = logging.getLogger(__name__)

SLOW_S = 60.0
"""An update that takes longer than this is told of."""
TWICE = 1.2
"""Bytes that came per byte of an update; more is told of."""
CUTS = 3
"""Connections that broke while one update came; each so many are told of."""
_AGAIN = 2.0
"""A device is told of again when it is so many times slower than it was told to be."""
_DEVICES_MAX = 1000
"""So many devices are remembered; of more nothing is told."""


class _Told(NamedTuple):
    seconds: float = 0.0
    share: float = 1.0


class SlowLinks:
    """No device is told of in every round: again when it has become twice as slow, or when its connection breaks on."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}
        self._cuts: dict[str, int] = {}

    def came(self, device_id: str, *, size_bytes: int, received_bytes: int, seconds: float) -> None:
        """An update is whole: of so many bytes, for which so many came."""
        self._cuts.pop(device_id, None)
        old, share = self._told.get(device_id, _Told()), received_bytes / max(1, size_bytes)
        is_slow = seconds > max(SLOW_S, _AGAIN * old.seconds)
        is_again = share > max(TWICE, _AGAIN * (old.share - 1) + 1)
        if not (is_slow or is_again) or not self._may_remember(device_id):
            return
        self._told[device_id] = _Told(max(seconds, old.seconds), max(share, old.share))
        pace = size_bytes / max(seconds, 1e-3)
        more = f", and {share:.1f} times its bytes came" if share > TWICE else ""
        log.warning(
            "slow link: the update of %s, %.0f kB, took %.0f s (%.1f kB/s)%s; a codec such as int8 makes it smaller, "
            "--deadline-s waits longer",
            device_id,
            size_bytes / 1e3,
            seconds,
            pace / 1e3,
            more,
        )

    def broke(self, device_id: str, *, share: float) -> None:
        """The connection of a device broke while its update came, of which a share is here."""
        if not self._may_remember(device_id):
            return
        count = self._cuts[device_id] = self._cuts.get(device_id, 0) + 1
        if count % CUTS == 0:
            log.warning(
                "broken link: the connection of %s broke %d times while its update came, of which %.0f %% is here; its chunks "
                "become smaller each time",
                device_id,
                count,
                100 * share,
            )

    def _may_remember(self, device_id: str) -> bool:
        known = device_id in self._told or device_id in self._cuts
        return known or len(self._told) + len(self._cuts) < _DEVICES_MAX
