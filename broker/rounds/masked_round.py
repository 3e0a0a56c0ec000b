"""One attempt at a sum under masks: keys, shares, updates, and the shares that take the masks off; events in, actions out.

What devices say and what is decided of it are *notes*: each is durable before anybody hears of it, and a restart takes them up in
their order. So a device is asked the same after a kill, and one that delivered is never asked about as one that did not.

Source: Bonawitz et al., arXiv 1611.04482, figure 4 (its rounds 0 to 4); Bell et al., ACM CCS 2020 (the graph). That keys are told
with the acceptance of an offer, and what waits for whom how long, is ours.
"""

import logging
import secrets
from collections.abc import Collection, Iterable
from math import inf
from typing import Any

import msgspec

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.rounds.actions import Action, Record, Tell
from fleetune.broker.rounds.told_shares import SECRET, SEED, ToldShares
from fleetune.broker.tasks import Note, Task, listed
from fleetune.device_runtime.contracts.fields import MESSAGE_BYTES_MAX
from fleetune.device_runtime.contracts.mask_messages import (
    MaskAsk,
    MaskGroup,
    MaskInbox,
    MaskKeys,
    MaskPeer,
    MaskReveal,
    MaskShare,
    MaskShares,
)
from fleetune.device_runtime.contracts.secure_sums.graph import degree_of, neighbours, threshold_of
from fleetune.device_runtime.contracts.secure_sums.keys import Scope, key_problem
from fleetune.device_runtime.contracts.secure_sums.masking import Unmasking
from fleetune.device_runtime.contracts.secure_sums.vouching import problem_of_peer
from fleetune.device_runtime.contracts.wire import MaskMessage, decode, encode
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.prepared import prepared

log = logging.getLogger(__name__)

KEYS, SHARES, UPDATES, REVEALS = PHASES = ("keys", "shares", "updates", "reveals")
MEMBERS, SHARERS, DELIVERED = DECIDED = ("members", "sharers", "delivered")
"""Kinds of notes of decisions; those of what devices said are the messages' tags."""
ASK_AGAIN_S = 10.0
"""Who has not told its shares is asked again so often."""
_KIND = {MaskKeys: "mask_keys", MaskShares: "mask_shares", MaskReveal: "mask_reveal"}
_HEAD_BYTES, _PEER_BYTES = 1024, 224
"""Of a message to one device, and of each neighbour in it, at most, but for what vouches for keys."""
_NAMES = msgspec.msgpack.Decoder(prepared(list[str]))


class MaskedRound:
    """The masks of a round's updates, from the first key to the last share."""

    def __init__(
        self, settings: Settings, patience: Patience, *, number: int, first: int, now: float
    ) -> None:
        """Begin an attempt at round ``number`` whose tasks have positions from ``first`` on."""
        self._settings, self._wait_s = settings, patience.secure_s
        self._now = self._since = self._asked_at = now
        self._number, self.group = number, f"{number}-{first}"
        self._tasks: dict[str, Task] = {}
        self._keys: dict[str, MaskKeys] = {}
        self._told_keys: set[bytes] = set()
        """Public keys of all of them."""
        self._shares: dict[str, MaskShares] = {}
        self._reveals: dict[str, MaskReveal] = {}
        self._members: tuple[str, ...] = ()
        """By place."""
        self._num_fitting = 1
        self._sharers: frozenset[str] = frozenset()
        self._delivered: frozenset[str] = frozenset()
        self._places: dict[str, int] = {}
        self._sealed: dict[str, dict[int, bytes]] = {}
        """What devices sealed, by the places of whom it is for."""
        self._told = ToldShares()
        self._wanted: list[tuple[str, str]] = []
        """Secrets that take the masks off: their kind and device."""
        self._gone: dict[str, float] = {}
        """Devices that are known to be gone, and since when; the last to go comes last."""
        self._judged: tuple[str, ...] = ()
        """Those without whom enough are left, as was found before."""

    @property
    def phase(self) -> str:
        """One of PHASES: what it waits for."""
        if self._delivered:
            return REVEALS
        return UPDATES if self._sharers else SHARES if self._members else KEYS

    @property
    def is_taking_devices(self) -> bool:
        """Whether a device that is asked now can still take part."""
        return self.phase == KEYS

    def ask(self, tasks: Iterable[Task]) -> None:
        """These devices are asked."""
        self._tasks |= {task.device_id: task for task in tasks}

    def takes_part(self, device_id: str) -> bool:
        """Whether an update of a device can be in the sum."""
        return device_id in self._sharers

    def lost(self, device_id: str) -> bool:
        """Whether a device that was asked can take no part any more: it was too slow."""
        if self.phase == KEYS:
            return False
        return device_id not in (self._members if self.phase == SHARES else self._sharers)

    def refusal(self, message: MaskMessage) -> str:
        """Say why a message cannot be taken; empty if it can, or was taken before."""
        task = self._tasks.get(message.device_id)
        if task is None or message.task_id != task.task_id or message.round != self._number:
            return f"masks of {message.task_id[:64]!r}: this device's task is another"
        if isinstance(message, MaskKeys):
            return self._problem_of_keys(message)
        if message.group[:64] != self.group:
            return f"masks of group {message.group[:64]!r}; this is {self.group!r}"
        return self._problem_of_shares(message) if isinstance(message, MaskShares) else self._problem(message)

    def is_new(self, message: MaskMessage) -> bool:
        """Whether a message that is not refused says something that is not known yet."""
        return message.device_id not in self._said(_KIND[type(message)])

    def take(self, note: Note, now: float) -> None:
        """Take up what is durable: something new that a device said, or a decision."""
        self._now = now
        if note.kind in DECIDED:
            self._decide(note.kind, tuple(_NAMES.decode(note.content)))
            self._since = self._asked_at = now
            return
        message = _decoded(note)
        self._said(note.kind)[message.device_id] = message
        if isinstance(message, MaskKeys):
            self._told_keys |= {message.mask_key, message.share_key}
        if isinstance(message, MaskShares):
            self._sealed[message.device_id] = {share.place: share.data for share in message.shares}
        if isinstance(message, MaskReveal):
            self._told.take(message, self._places[message.device_id])

    def retell(self, device_id: str) -> list[Action]:
        """What a device should know by now, to be told once more."""
        if self.phase == REVEALS:
            is_asked = device_id in self._delivered and device_id not in self._reveals
            return [self._tell_ask(device_id)] if is_asked else []
        if device_id in self._sharers:
            return [self._tell_inbox(device_id)]
        is_asked = self.phase == SHARES and device_id in self._members and device_id not in self._shares
        return [self._tell_group(device_id)] if is_asked else []

    def lose(self, device_id: str, now: float) -> None:
        """A device is gone."""
        self._gone.setdefault(device_id, now)

    def find(self, device_id: str) -> None:
        """A device is there, or again."""
        self._gone.pop(device_id, None)

    def lost_by(self, grace_s: float) -> float:
        """When those that are gone are waited for no longer; inf where nobody waits for shares, or none is gone."""
        return next(reversed(self._gone.values()), inf) + grace_s if self.phase == REVEALS else inf

    def is_out_of_reach(self, now: float, grace_s: float) -> bool:
        """Whether too few are left to tell what takes the masks off, without those that are gone for longer than the grace."""
        if self.lost_by(grace_s) > now or (gone := tuple(self._gone)) == self._judged:
            return False
        if any(self._num_tellers(kind, device) < self._threshold for kind, device in self._wanted):
            return True
        self._judged = gone
        return False

    def _num_tellers(self, kind: str, device: str) -> int:
        """How many have told their shares of a secret, or are there and asked for them."""
        asked = [h for h in self._holders(device) if h in self._delivered and h not in self._reveals]
        there = sum(holder not in self._gone for holder in asked)
        return self._told.count(kind, self._places[device]) + there

    def advance(self, waiting: Collection[str], now: float) -> list[Action]:
        """Do what the events so far, and the time, call for; ``waiting`` are the devices that still owe an update."""
        self._now = now
        if self.phase == KEYS:
            ready = [device for device in waiting if device in self._keys]
            is_all = len(ready) == len(waiting) or len(ready) >= self._settings.clients
            return self._make_group(ready) if self._may_go_on(ready, is_all) else []
        if self.phase == SHARES:
            ready = [device for device in waiting if device in self._shares]
            if not self._may_go_on(ready, len(ready) == len(waiting)):
                return []
            ready = self._recoverable(ready)
            return self._share(ready) if self._may_go_on(ready, is_all=True) else []
        if self.phase == REVEALS and now >= self._asked_at + ASK_AGAIN_S:
            self._asked_at = now
            return [action for device in sorted(self._delivered) for action in self.retell(device)]
        return []

    def can_unmask(self, delivered: Collection[str]) -> bool:
        """Whether these hold enough shares of the secrets that take the masks off their sum."""
        there = {*delivered}
        wanted = [d for d in self._sharers if d in there or there.intersection(self._around(d))]
        return all(sum(h in there for h in self._holders(d)) >= self._threshold for d in wanted)

    def close(self, delivered: Iterable[str]) -> list[Action]:
        """No update is taken any more: ask for the shares."""
        decided = self._record(DELIVERED, sorted(delivered))
        return [decided, *(self._tell_ask(device) for device in sorted(self._delivered))]

    def unmasking(self) -> Unmasking | None:
        """What takes the masks off the sum; None as long as shares are missing, or wrong."""
        found: dict[str, dict[int, bytes]] = {SEED: {}, SECRET: {}}
        for kind, device in self._wanted:
            secret = self._secret(kind, device)
            if not secret:
                return None
            found[kind][self._places[device]] = secret
        return Unmasking(
            scope=self._scope,
            members=tuple(self._peer(device) for device in self._members),
            degree=self._degree,
            delivered=tuple(sorted(found[SEED])),
            seeds=found[SEED],
            secrets=found[SECRET],
        )

    def unfit(self) -> list[str]:
        """Devices of whose secrets enough shares came, and do not fit: something in them, or in their keys, is wrong."""
        enough = [(k, d) for k, d in self._wanted if self._told.count(k, self._places[d]) >= self._threshold]
        return sorted({device for kind, device in enough if not self._secret(kind, device)})

    @property
    def due_at(self) -> float:
        """Time at which ``advance`` has something to do without a message; inf for never."""
        if self.phase in (KEYS, SHARES):
            late = self._since + self._wait_s
            return late if late > self._now else inf
        return self._asked_at + ASK_AGAIN_S if self.phase == REVEALS else inf

    def _may_go_on(self, ready: Collection[str], is_all: bool) -> bool:
        is_enough = len(ready) >= self._settings.min_clients
        return is_enough and (is_all or self._now >= self._since + self._wait_s)

    def _make_group(self, ready: list[str]) -> list[Action]:
        """Draw places for those whose keys are here; the order comes from the operating system."""
        order = self._vouched(ready)[: self._settings.clients]
        secrets.SystemRandom().shuffle(order)
        decided = self._record(MEMBERS, order)
        log.info("round %d: masks are agreed on by %s", self._number, listed(sorted(order)))
        return [decided, *(self._tell_group(device) for device in sorted(self._members))]

    def _vouched(self, ready: list[str]) -> list[str]:
        """Those whose certificates vouch for their keys, where these are enough: with others they might not mask."""
        vouched = [device for device in ready if self._keys[device].certificate]
        return vouched if len(vouched) >= self._settings.min_clients else ready

    def _share(self, ready: list[str]) -> list[Action]:
        decided = self._record(SHARERS, ready)
        log.info("round %d: masked are the updates of %s", self._number, listed(sorted(ready)))
        return [decided, *(self._tell_inbox(device) for device in sorted(self._sharers))]

    def _recoverable(self, ready: Iterable[str]) -> list[str]:
        """Those of ``ready`` around whom enough are left to recover their secrets."""
        left = set(ready)
        while few := [d for d in left if sum(h in left for h in self._holders(d)) < self._threshold]:
            left.difference_update(few)
        return sorted(left)

    def _record(self, kind: str, devices: Iterable[str]) -> Record:
        note = Note(kind, "", msgspec.msgpack.encode([*devices]))
        self.take(note, self._now)
        return Record(self._number, note)

    def _decide(self, kind: str, devices: tuple[str, ...]) -> None:
        match kind:
            case "members":
                self._members = devices
                self._places = {device: place for place, device in enumerate(devices)}
                self._num_fitting = self._count_fitting()
            case "sharers":
                self._sharers = frozenset(devices)
            case _:
                self._delivered = frozenset(devices)
                gone = [d for d in sorted(self._sharers - self._delivered) if self._is_masked_with(d)]
                self._wanted = [*((SEED, d) for d in devices), *((SECRET, d) for d in gone)]

    def _said(self, kind: str) -> dict[str, Any]:
        said: dict[str, dict[str, Any]] = {
            "mask_keys": self._keys,
            "mask_shares": self._shares,
            "mask_reveal": self._reveals,
        }
        return said[kind]

    @property
    def _scope(self) -> Scope:
        return Scope(self._settings.job, self.group)

    @property
    def _degree(self) -> int:
        degree = degree_of(len(self._members), self._settings.secure_neighbours)
        return min(degree, degree_of(len(self._members), self._num_fitting))

    def _count_fitting(self) -> int:
        """So many neighbours fit in the message that tells of them, with the certificates that they have."""
        keys = [self._keys[device] for device in self._members]
        vouched = max((len(one.certificate) + len(one.signature) for one in keys), default=0)
        return (MESSAGE_BYTES_MAX - _HEAD_BYTES) // (_PEER_BYTES + vouched)

    @property
    def _threshold(self) -> int:
        return threshold_of(self._degree, self._settings.secure_threshold)

    def _around(self, device: str) -> list[str]:
        size = len(self._members)
        return [self._members[p] for p in neighbours(self._places[device], size, self._degree)]

    def _holders(self, device: str) -> list[str]:
        return [device, *self._around(device)]

    def _is_masked_with(self, device: str) -> bool:
        return any(other in self._delivered for other in self._around(device))

    def _peer(self, device: str) -> MaskPeer:
        keys = self._keys[device]
        return MaskPeer(
            place=self._places[device],
            device_id=device,
            mask_key=keys.mask_key,
            share_key=keys.share_key,
            certificate=keys.certificate,
            signature=keys.signature,
        )

    def _tell_group(self, device: str) -> Tell:
        task = self._tasks[device]
        message = MaskGroup(
            **self._header(task),
            place=self._places[device],
            mask_key=self._keys[device].mask_key,
            threshold=self._threshold,
            peers=[self._peer(other) for other in self._around(device)],
        )
        return Tell(device, message)

    def _tell_inbox(self, device: str) -> Tell:
        mine = self._places[device]
        found = [
            MaskShare(place=self._places[other], data=self._sealed[other][mine])
            for other in self._around(device)
            if other in self._sharers
        ]
        return Tell(device, MaskInbox(**self._header(self._tasks[device]), shares=found))

    def _tell_ask(self, device: str) -> Tell:
        around = [d for d in self._holders(device) if d in self._sharers]
        delivered = [self._places[d] for d in around if d in self._delivered]
        dropped = [self._places[d] for d in around if d not in self._delivered]
        message = MaskAsk(
            **self._header(self._tasks[device]), delivered=sorted(delivered), dropped=sorted(dropped)
        )
        return Tell(device, message)

    def _header(self, task: Task) -> dict[str, Any]:
        return {
            "job": self._settings.job,
            "task_id": task.task_id,
            "round": self._number,
            "group": self.group,
        }

    def _problem_of_keys(self, message: MaskKeys) -> str:
        """Say what is wrong with keys: those with which nobody would mask must not reach the others."""
        if message.device_id in self._keys:
            return ""
        if self.phase != KEYS:
            return "the group is made"
        if {message.mask_key, message.share_key} & self._told_keys:
            return "one of its keys is another device's"
        if message.certificate and (problem := problem_of_peer(self._scope, message)):
            return problem
        return key_problem(message.mask_key) or key_problem(message.share_key)

    def _problem_of_shares(self, message: MaskShares) -> str:
        device = message.device_id
        if device in self._shares:
            return ""
        if self.phase != SHARES or device not in self._members:
            return "shares are not taken now"
        expected = sorted(self._places[other] for other in self._around(device))
        if sorted(share.place for share in message.shares) != expected:
            return f"shares for {len(message.shares)} places; expected one for each of {len(expected)}"
        return ""

    def _problem(self, message: MaskReveal) -> str:
        device = message.device_id
        if self.phase != REVEALS or device not in self._delivered:
            return "nobody asked for these shares"
        around = set(self._holders(device))
        for told, allowed in (
            (message.seeds, self._delivered),
            (message.secrets, self._sharers - self._delivered),
        ):
            places = [share.place for share in told]
            known = {self._places[d] for d in allowed & around}
            if len(set(places)) != len(places) or not known.issuperset(places):
                return "shares of places that it was not asked for, or twice"
        return ""

    def _secret(self, kind: str, device: str) -> bytes:
        return self._told.secret(kind, self._places[device], self._keys[device], self._threshold)


def note_of(message: MaskMessage) -> Note:
    """What a device said, to be kept."""
    return Note(_KIND[type(message)], message.device_id, encode(message))


def _decoded(note: Note) -> MaskMessage:
    found = decode(note.content)
    if not isinstance(found, MaskKeys | MaskShares | MaskReveal):
        raise WireError(f"a note of masks holds a {type(found).__name__}")
    return found
