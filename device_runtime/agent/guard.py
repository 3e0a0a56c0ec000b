"""What a device takes from the wire: of an aggregator only what a trusted key signed, and nothing that is said again."""

import logging

from fleetune.device_runtime.agent.home import Home
from fleetune.device_runtime.agent.taken import Taken
from fleetune.device_runtime.contracts.seal import Seal, Stamp, parse_seal
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Message,
    Offer,
    aggregator_topic,
    decode,
)
from fleetune.device_runtime.network.complaints import Complaints
from fleetune.device_runtime.network.connection import send
from fleetune.device_runtime.network.signing import Trusted

log = logging.getLogger(__name__)


def guard_of(home: Home) -> "Guard | OpenDoor":
    """Return the guard of a device, as its owner has it; StateError if what was kept is damaged."""
    return Guard(home, home.trusted) if home.trusted else OpenDoor()


class OpenDoor:
    """Lets in all that can be decoded: the device's owner names no key."""

    def open(self, topic: str, payload: bytes, now: float) -> Message:
        """Decode a message; WireError if it is none."""
        return decode(payload)

    def admits(self, offer: Offer, now: float) -> bool:
        """Whether work on an offer may begin."""
        return True

    def close(self) -> None:
        """The job is over."""


class Guard:
    """The door of one device in one job; each kind of message that is refused has one line a minute in the log."""

    def __init__(self, home: Home, trusted: Trusted) -> None:
        """Prepare; StateError if what was kept is damaged."""
        self._link, self._identity, self._trusted = home.link, home.identity, trusted
        self._status_topic = aggregator_topic(home.identity.job)
        self._taken = Taken(home.outbox, home.identity.job)
        self._complaints = Complaints(lines_max=1)

    def open(self, topic: str, payload: bytes, now: float) -> Message | None:
        """Decode a message; None if it is not to be taken, which is told.

        Raises:
            WireError: it cannot be decoded.
            StateError: what is to be remembered cannot be written.
        """
        seal = parse_seal(topic, payload)
        if seal is None:
            return self._unsigned(topic, decode(payload), now)
        if not self._trusted.knows(seal.key_id):
            self._refuse(topic, "of another key", now, f"key {seal.key_id.hex()} signed it")
            return None
        if self._is_old(topic, seal.stamp):
            self._refuse_old(topic, seal, payload, now)
            return None
        if not self._trusted.verify(seal):
            self._refuse(topic, "of no key", now, _forged(seal))
            return None
        self._advance(topic, seal.stamp)
        return decode(payload)

    def admits(self, offer: Offer, now: float) -> bool:
        """Whether work on an offer may begin, which is kept; else the log and the aggregator are told."""
        if offer.role != self._identity.role:
            return True  # refused by its role
        if reason := self._taken.behind(offer):
            self._complaints.warn("rolled back", now, "round %d: declined: %s", offer.round, reason)
            self._decline(offer, reason)
            return False
        self._taken.take(offer)
        return True

    def close(self) -> None:
        """The word that the job is over was obeyed: said again, it is not."""
        self._taken.close()

    def _unsigned(self, topic: str, message: Message, now: float) -> Message | None:
        if isinstance(message, Chunk) and topic != self._status_topic:
            return message  # its digest is in a signed offer
        if isinstance(message, AggregatorStatus) and not (message.session or message.finished):
            return None  # an aggregator asks whether another is there: no device minds it
        kind = type(message).__name__
        self._refuse(topic, f"{kind}, not signed", now, f"{kind} is not signed")
        return None

    def _is_old(self, topic: str, stamp: Stamp) -> bool:
        """Compare stamps; of a status, which is retained and may be older than an offer, the starts alone."""
        newest = self._taken.newest
        return stamp.start < newest.start if topic == self._status_topic else stamp < newest

    def _advance(self, topic: str, stamp: Stamp) -> None:
        self._taken.advance(stamp._replace(number=0) if topic == self._status_topic else stamp)

    def _refuse_old(self, topic: str, seal: Seal, payload: bytes, now: float) -> None:
        """Refuse unread, but for one a minute: the aggregator of a job that began anew is told why nobody works."""
        if not self._complaints.may_tell(f"{topic} (old)", now):
            return
        if not self._trusted.verify(seal):
            self._log(topic, _forged(seal))
            return
        self._log(topic, _old(seal.stamp, self._taken.newest))
        message = decode(payload)
        if isinstance(message, Offer) and (reason := self._taken.behind(message)):
            self._decline(message, reason)

    def _refuse(self, topic: str, kind: str, now: float, said: str) -> None:
        if self._complaints.may_tell(f"{topic} ({kind})", now):
            self._log(topic, said)

    def _log(self, topic: str, said: str) -> None:
        job, names = self._identity.job, self._trusted.names
        log.warning("dropped a message on %s: %s; job %r takes what key %s signs", topic, said, job, names)

    def _decline(self, offer: Offer, reason: str) -> None:
        send(self._link, self._identity.up, self._identity.decline(offer, reason))


def _forged(seal: Seal) -> str:
    return f"key {seal.key_id.hex()} did not sign this for this topic"


def _old(found: Stamp, newest: Stamp) -> str:
    return (
        f"message {found.number} of the aggregator's start {found.start} is older than message {newest.number} of start "
        f"{newest.start}: it was recorded and said again, or the job began anew in another folder and needs another name"
    )
