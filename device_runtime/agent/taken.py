"""The newest that a device has taken of a job's signed words, kept over restarts: what is older is not taken again."""

from typing import Annotated

import msgspec
from msgspec import Meta

from fleetune.device_runtime.agent.outbox import Outbox
from fleetune.device_runtime.contracts.fields import Count, Word
from fleetune.device_runtime.contracts.seal import Stamp
from fleetune.device_runtime.contracts.wire import Offer
from fleetune.device_runtime.errors import StateError, one_line
from fleetune.device_runtime.prepared import prepared

_Number = Annotated[int, Meta(ge=0)]


class _Kept(msgspec.Struct, frozen=True):
    start: _Number = 0
    number: _Number = 0
    places: dict[Word, tuple[Count, Count]] = {}
    """(round, version) of the newest offer, by role: a device may train and later evaluate."""


class Taken:
    """One fact of the outbox; it is the job's, whatever the artifact and whichever trusted key signs."""

    def __init__(self, outbox: Outbox, job: str) -> None:
        """Read it; StateError if it is damaged."""
        self._outbox, self._job, self._key = outbox, job, f"signed/{job}"
        self._places, self.newest = self._read()

    def advance(self, stamp: Stamp) -> None:
        """A message with this stamp is taken; another start of the aggregator is kept at once, StateError if it cannot be."""
        is_new_start = stamp.start > self.newest.start
        self.newest = max(self.newest, stamp)
        if is_new_start:
            self._keep()

    def behind(self, offer: Offer) -> str:
        """Why an offer comes too late, newer work having been taken; empty if it does not."""
        number, version = self._places.get(offer.role, (0, 0))
        if offer.round >= number and offer.version >= version:
            return ""
        return (
            f"round {offer.round} from version {offer.version} is older than what this device has taken in job {self._job!r}, "
            f"round {number} from version {version}; a job that begins anew needs another name"
        )

    def take(self, offer: Offer) -> None:
        """Keep that an offer is taken; once this returns, its work may begin. StateError if it cannot be kept."""
        place = (offer.round, offer.version)
        if self._places.get(offer.role) != place:
            self._places[offer.role] = place
            self._keep()

    def close(self) -> None:
        """Nothing said until now is to be taken again, also after a restart; StateError if that cannot be kept."""
        self.newest = self.newest._replace(number=self.newest.number + 1)
        self._keep()

    def _keep(self) -> None:
        self._outbox.remember(self._key, msgspec.msgpack.encode(_Kept(*self.newest, self._places)))

    def _read(self) -> tuple[dict[str, tuple[int, int]], Stamp]:
        try:
            kept = msgspec.msgpack.decode(self._outbox.recall(self._key) or b"\x80", type=prepared(_Kept))
        except msgspec.MsgspecError as exc:
            wrong = f"what this device has taken in job {self._job!r} is damaged: {one_line(exc)}"
            raise StateError(f"{wrong}; move its state folder away to start afresh") from exc
        return dict(kept.places), Stamp(kept.start, kept.number)
