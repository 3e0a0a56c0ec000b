"""The open round: who was asked what, and where each device stands."""

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from math import inf

from fleetune.broker.tasks import Declined, Task, listed
from fleetune.device_runtime.errors import one_line, some

REFUSALS_MAX = 8
"""Refused updates of one device that are known again in a round."""


class Standing(Enum):
    """Where a device stands in the open round."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REFUSED = "refused"


class OpenRound:
    """One round from its opening to its closing; no question but ``of`` takes longer for more devices."""

    def __init__(self, number: int, deadline: float, *, first: int = 0) -> None:
        self.number, self.deadline, self.first = number, deadline, first
        """``first``: position of the first task that counts; those before are of attempts that were given up."""
        self.extensions = 0
        self.tasks: dict[str, Task] = {}
        """The newest of each device, in the order of their positions."""
        self.num_asked = first
        """Tasks so far; the next one's position."""
        self.again: set[str] = set()
        """Devices that declined, and have something else to be asked."""
        self.declines: dict[str, Declined] = {}
        """What devices said that declined their newest task, and have nothing else to be asked."""
        self._refusals: dict[str, dict[bytes, str]] = {}
        self._standing: dict[str, Standing] = {}
        self._gone: dict[str, float] = {}
        """Pending devices that are known to be gone, and since when; the last to go comes last."""
        self._counts: Counter[Standing] = Counter()

    def add(self, tasks: Iterable[Task]) -> None:
        """Ask devices."""
        for task in tasks:
            self.tasks.pop(task.device_id, None)
            self.tasks[task.device_id] = task
            self.num_asked = task.position + 1
            self.again.discard(task.device_id)
            self.stand(task.device_id, Standing.PENDING)

    def stand(self, device_id: str, standing: Standing) -> None:
        """Note where a device stands from now on."""
        if before := self._standing.get(device_id):
            self._counts[before] -= 1
        self._standing[device_id] = standing
        self._counts[standing] += 1
        self._gone.pop(device_id, None)
        self.declines.pop(device_id, None)

    def decline(self, device_id: str, said: Declined, *, again: bool) -> None:
        """A device does not do its task; ``again``: it has something else to be asked."""
        self.stand(device_id, Standing.REFUSED)
        if again:
            self.again.add(device_id)
        else:
            self.declines[device_id] = said

    @property
    def is_declined(self) -> bool:
        """Whether nobody owes an update, and those without one declined, and would again."""
        num_refused = self._counts[Standing.REFUSED]
        is_over = not self._counts[Standing.PENDING] and 0 < len(self.declines) == num_refused
        return is_over and all(said.is_lasting for said in self.declines.values())

    def declined_by(self) -> str:
        """Name the devices that declined, with what they said."""
        by_reason: dict[str, list[str]] = {}
        for device, said in sorted(self.declines.items()):
            by_reason.setdefault(one_line(said.reason), []).append(device)
        return some([f"{listed(devices)}: {reason}" for reason, devices in by_reason.items()], by="; ")

    def forgive(self) -> None:
        """Let the devices that declined be asked once more."""
        self.again.update(self.declines)
        self.declines.clear()

    def lose(self, device_id: str, now: float) -> None:
        """A device is gone; only if it owes an update that matters."""
        if self._standing.get(device_id) is Standing.PENDING:
            latest = next(reversed(self._gone.values()), -inf)
            self._gone.setdefault(device_id, max(now, latest))

    def find(self, device_id: str) -> None:
        """A device is there, or again."""
        self._gone.pop(device_id, None)

    @property
    def num_living(self) -> int:
        """How many pending devices are not known to be gone."""
        return self._counts[Standing.PENDING] - len(self._gone)

    def lost_by(self, grace_s: float) -> float:
        """When the last that is gone has been for so long; -inf if nobody is."""
        return next(reversed(self._gone.values()), -inf) + grace_s

    def waited_for(self, now: float, grace_s: float) -> tuple[str, ...]:
        """Pending devices, in the order of their positions; without the gone, once the last of them is for so long."""
        pending = self.of(Standing.PENDING)
        if self.lost_by(grace_s) > now:
            return pending
        return tuple(device for device in pending if device not in self._gone)

    def refuse(self, device_id: str, identity: bytes, reason: str) -> None:
        """Remember why an update was refused, known by all of its announcement; of a device the newest few."""
        refusals = self._refusals.setdefault(device_id, {})
        refusals[identity] = reason
        while len(refusals) > REFUSALS_MAX:
            del refusals[next(iter(refusals))]

    def refusal(self, device_id: str, identity: bytes) -> str:
        """Why an update was refused; empty if it was not, or that is forgotten: then its payload is seen again."""
        return self._refusals.get(device_id, {}).get(identity, "")

    def standing(self, device_id: str) -> Standing | None:
        """Where a device stands; None if it was not asked."""
        return self._standing.get(device_id)

    def count(self, standing: Standing) -> int:
        """How many devices stand there."""
        return self._counts[standing]

    def of(self, standing: Standing) -> tuple[str, ...]:
        """Which devices stand there, in the order of their positions."""
        return tuple(d for d, s in self._standing.items() if s is standing)
