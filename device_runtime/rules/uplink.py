"""What kind of network the default route goes through: wired, wireless, cellular, other or none."""

from collections.abc import Iterator
from pathlib import Path

from fleetune.device_runtime.rules.rules import NetworkKind
from fleetune.device_runtime.rules.sysfs import list_folders, read_text

_UP, _REJECT = 0x1, 0x200
_CELLULAR_NAMES = ("wwan", "rmnet", "ppp")
_DEAREST_FIRST: tuple[NetworkKind, ...] = ("cellular", "other", "wireless", "wired")
_STACKED_AT_MOST = 4


def uplink_kind(root: Path) -> tuple[NetworkKind | None, str]:
    """Kind of the network that the default route goes through (IPv4's first), and why it is unknown if it is.

    A bridge, bond or VLAN is what it stands on, the dearest if on several; a tunnel or a container's veth is ``other``.
    """
    tables = [root / "proc/net/route", root / "proc/net/ipv6_route"]
    texts = [read_text(path) for path in tables]
    if not any(texts):
        return None, "there is no routing table"
    routes = sorted(_routes_4(texts[0])) or sorted(_routes_6(texts[1]))
    if not routes:
        return "none", ""
    name = routes[0][1]
    folder = root / "sys/class/net" / name
    return (_kind(folder), "") if folder.is_dir() else (None, f"{name} is not in /sys/class/net")


def _routes_4(text: str) -> Iterator[tuple[int, str]]:
    """Default routes as (metric, interface); the columns are those of fib_route_seq_show."""
    for line in text.splitlines()[1:]:
        cells = line.split()
        if len(cells) >= 8 and cells[1] == cells[7] == "00000000" and _is_usable(cells[3]):
            yield _integer(cells[6], 10), cells[0]


def _routes_6(text: str) -> Iterator[tuple[int, str]]:
    for line in text.splitlines():
        cells = line.split()
        if (
            len(cells) >= 10
            and set(cells[0] + cells[1]) == {"0"}
            and cells[9] != "lo"
            and _is_usable(cells[8])
        ):
            yield _integer(cells[5], 16), cells[9]


def _is_usable(flags: str) -> bool:
    return _integer(flags, 16) & (_UP | _REJECT) == _UP


def _integer(text: str, radix: int) -> int:
    try:
        return int(text, radix)
    except ValueError:
        return 0


def _kind(folder: Path, depth: int = 0) -> NetworkKind:
    event = read_text(folder / "uevent").splitlines()
    if "DEVTYPE=wwan" in event or folder.name.startswith(_CELLULAR_NAMES):
        return "cellular"
    if "DEVTYPE=wlan" in event or (folder / "wireless").exists() or (folder / "phy80211").exists():
        return "wireless"
    below = list_folders(folder, "lower_*") if depth < _STACKED_AT_MOST else []
    if below:
        kinds = {_kind(folder.parent / link.name.removeprefix("lower_"), depth + 1) for link in below}
        return next(kind for kind in _DEAREST_FIRST if kind in kinds)
    is_ethernet = read_text(folder / "type") == "1"
    return "wired" if is_ethernet and (folder / "device").exists() else "other"
