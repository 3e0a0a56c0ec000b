"""Selections: which of the devices here are asked; and the roster that they are drawn from."""

from collections.abc import Callable, Container, Sequence

from fleetune.device_runtime.draws import Key, permutation
from fleetune.device_runtime.tables import Table

Draw = Callable[[int], Sequence[int]]
"""n -> a permutation of range(n)"""
Selection = Callable[[Sequence[str], Container[str], int, Draw], tuple[str, ...]]
"""(present devices, those of them that are paused, how many at most, draw) -> devices to ask, in the order of ``present``"""


def uniform(present: Sequence[str], paused: Container[str], limit: int, draw: Draw) -> tuple[str, ...]:
    """Draw ``limit`` devices, each as likely as another; paused ones only where the others are too few."""
    order = sorted(draw(len(present)), key=lambda i: present[i] in paused)
    return tuple(present[i] for i in sorted(order[:limit]))


SELECTIONS: Table[Selection] = Table("selection", {"uniform": uniform})


def seeded(seed: int, *, round_number: int, asked: int = 0) -> Draw:
    """Return the draws of a job's selection in a round in which ``asked`` devices were asked before."""
    key = Key(seed, "selection", round_number, asked)
    return lambda count: permutation(key, count).tolist()


class Roster:
    """The devices here that train: who they are, who is paused, and who has not been asked in the open round."""

    def __init__(self, select: Selection) -> None:
        self.paused: dict[str, str] = {}
        """Why a device's own rules keep it from working, by device, be it here or not."""
        self._select = select
        self.barred: dict[str, str] = {}
        """Devices that are asked no more, and why."""
        self._present: set[str] = set()
        self._free: set[str] = set()

    def __len__(self) -> int:
        return len(self._present)

    def __contains__(self, device_id: object) -> bool:
        return device_id in self._present

    @property
    def present(self) -> tuple[str, ...]:
        """Devices here."""
        return tuple(sorted(self._present))

    def arrive(self, device_id: str, *, is_asked: bool) -> None:
        """A device is here, or still here; ``is_asked``: it belongs to the open round. One that is barred counts for nothing."""
        if device_id in self.barred:
            return
        self._present.add(device_id)
        if not is_asked:
            self._free.add(device_id)

    def leave(self, device_id: str) -> None:
        """A device is gone."""
        self._present.discard(device_id)
        self._free.discard(device_id)

    def bar(self, device_id: str, reason: str) -> None:
        """Ask a device no more."""
        self.barred[device_id] = reason
        self.leave(device_id)

    def pause(self, device_id: str, reason: str) -> None:
        """Note why a device does not work now; empty if it does."""
        if reason:
            self.paused[device_id] = reason
        else:
            self.paused.pop(device_id, None)

    def take(
        self, limit: int, draw: Draw, *, is_left_out: Callable[[str], bool] = lambda _: False
    ) -> tuple[str, ...]:
        """Select at most ``limit`` of the free devices that are not left out; they are free no more."""
        fit = [device for device in sorted(self._free) if not is_left_out(device)]
        chosen = self._select(fit, self.paused, limit, draw)
        self._free.difference_update(chosen)
        return chosen

    def release(self) -> None:
        """The round is closed: everyone here may be asked again."""
        self._free = set(self._present)
