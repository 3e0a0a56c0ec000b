"""Bytes by device, direction and kind: exact in their sum, whatever is repeated; by kind once a transfer is known whole."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from fleetune.broker.store.store import ByKind, Carried
from fleetune.device_runtime.contracts.codecs import sizes_by_kind
from fleetune.device_runtime.errors import WireError

DEVICES_MAX = 100_000
"""Devices that are counted each for itself; all further ones, and what is none's, are counted together."""
SHARED = "(shared)"
"""In the place of a device: what was published once for several. No device has such a name."""
DOWN, UP = "down", "up"
_BLANK = ByKind()


class _Part(NamedTuple):
    """Chunks of one transfer to or from one device."""

    device: str
    way: str
    sha256: str


class Freight:
    """Counts messages, and the data of chunks apart; ``take`` gives what has come together."""

    def __init__(self) -> None:
        self._protocol: Counter[tuple[str, str]] = Counter()
        """By (device, way)."""
        self._data: Counter[_Part] = Counter()
        self._sizes: dict[str, ByKind] = {}
        self._names: set[str] = set()

    def message(self, device: str, way: str, size_bytes: int) -> None:
        """Count a whole message."""
        self._protocol[self._named(device), way] += size_bytes

    def data(self, device: str, way: str, sha256: str, size_bytes: int) -> None:
        """Say of a message counted before that so many of its bytes are of a transfer."""
        device = self._named(device)
        self._protocol[device, way] -= size_bytes
        self._data[_Part(device, way, sha256)] += size_bytes

    def knows(self, sha256: str, sizes: ByKind) -> None:
        """Say what a transfer is made of."""
        self._sizes[sha256] = sizes

    def take(self, *, all_of_it: bool) -> dict[str, Carried]:
        """Give and forget what was counted, by device, but the data of uploads that are not whole.

        Args:
            all_of_it: those too, as values: nobody will know better.
        """
        ready = [part for part in self._data if all_of_it or part.sha256 in self._sizes]
        parts = [
            (part.device, part.way, parted(self._data.pop(part), self._sizes.get(part.sha256)))
            for part in ready
        ]
        said = [(device, way, ByKind(protocol=n)) for (device, way), n in self._protocol.items() if n]
        self._protocol.clear()
        self._sizes.clear()
        found: dict[str, Carried] = {}
        for device, way, sizes in (*parts, *said):
            one = Carried(down=sizes) if way == DOWN else Carried(up=sizes)
            found[device] = found.get(device, Carried()) + one
        return found

    def _named(self, device: str) -> str:
        if device not in self._names and len(self._names) >= DEVICES_MAX:
            return ""
        self._names.add(device)
        return device


def parted(size_bytes: int, sizes: ByKind | None) -> ByKind:
    """Part the data of chunks as their transfer is parted, exactly where they are it or repeat it; unknown: values."""
    if sizes is None or not sizes.total:
        return ByKind(values=size_bytes)
    bounds = [sizes.values, sizes.values + sizes.positions, sizes.total - sizes.protocol, sizes.total]
    at = [0, *(size_bytes * bound // sizes.total for bound in bounds)]
    return ByKind(values=at[1] - at[0], positions=at[2] - at[1], scales=at[3] - at[2], protocol=at[4] - at[3])


def sizes_of_update(payload: bytes) -> ByKind:
    """What a payload of a codec is made of; of one that is malformed all are values."""
    try:
        return _made(sizes_by_kind(payload))
    except WireError:
        return ByKind(values=len(payload))


def sizes_of_file(content: bytes) -> ByKind:
    """What a safetensors file is made of: its header is protocol."""
    header = min(8 + int.from_bytes(content[:8], "little"), len(content))
    return ByKind(values=len(content) - header, protocol=header)


def _made(sizes: Mapping[str, int]) -> ByKind:
    return ByKind(**sizes)
