"""A device's part in a sum under masks: its keys, the shares of its secrets, and what it tells of others' shares, once.

All of it is in one private file before any of it is sent: a device that is killed goes on with the same keys, gives the same
shares, and tells of each device one kind of share at most.
"""

import logging
from collections.abc import Sequence
from hashlib import sha256
from math import inf

import msgspec

from fleetune.device_runtime.agent.home import Home
from fleetune.device_runtime.contracts.fields import Key32, Word
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
from fleetune.device_runtime.contracts.secure_sums.grid import Whole
from fleetune.device_runtime.contracts.secure_sums.keys import (
    Scope,
    digest_of_seed,
    need_cryptography,
    new_secret,
    new_seed,
    public_of,
    seal,
    unseal,
)
from fleetune.device_runtime.contracts.secure_sums.masking import Masker, mask
from fleetune.device_runtime.contracts.secure_sums.shares import SHARE_BYTES, split
from fleetune.device_runtime.contracts.secure_sums.vouching import Vouched, problem_of_peer
from fleetune.device_runtime.contracts.wire import Message, Offer, encode
from fleetune.device_runtime.contracts.work import SumGrid
from fleetune.device_runtime.errors import ConfigError, WireError, some
from fleetune.device_runtime.network.connection import send
from fleetune.device_runtime.prepared import prepared

log = logging.getLogger(__name__)

FILE = "masks.bin"
REPEAT_S, REPEAT_MAX_S = 5.0, 60.0
_FEWEST_PEERS = 2
"""With fewer, whoever masks with this device could take its update from their sum."""


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """All of one task; secrets are blank once they are of no use."""

    key: Word
    """Of the offer."""
    job: Word
    task_id: str
    round: int
    secret: Key32
    """X25519 private key of the pair masks."""
    share_secret: Key32
    """X25519 private key for which shares are sealed."""
    seed: Key32
    offered: Word = ""
    """The group that the keys are for; empty where the aggregator did not say."""
    group: MaskGroup | None = None
    shares: MaskShares | None = None
    own: tuple[bytes, bytes] = (b"", b"")
    """The device's own shares of its seed and of its secret."""
    inbox: MaskInbox | None = None
    asked: MaskAsk | None = None
    reveal: MaskReveal | None = None


class Masking:
    """The masks of one device's newest task; those of an older one are gone with it."""

    def __init__(self, home: Home) -> None:
        """Take up what an earlier life has left; of a damaged file nothing."""
        self._home, self._files = home, home.files
        self._state = _parsed(self._files.read(FILE))
        self._due, self._pause_s = 0.0, REPEAT_S

    @property
    def due_at(self) -> float:
        """Time of the next announcement; inf if nothing is waited for."""
        return self._due if self._waiting() else inf

    def begin(self, offer: Offer, key: str) -> None:
        """Make keys for an offer, or go on with those that it has.

        Raises:
            ConfigError: the package that makes keys is missing; or others must be vouched for, and the offer names no group, or
                one for which this device has made keys before.
        """
        need_cryptography()
        if self._state is None or self._state.key != key:
            self._check_new(offer)
            self._keep(
                _State(
                    key=key,
                    job=offer.job,
                    task_id=offer.task_id,
                    round=offer.round,
                    secret=new_secret(),
                    share_secret=new_secret(),
                    seed=new_seed(),
                    offered=offer.mask_group,
                )
            )
        if self._is_strict:
            self._home.outbox.remember(self._newest_key, offer.mask_group.encode())
        self.rush()

    def rush(self) -> None:
        """Say again at the next opportunity what the aggregator may not know."""
        self._due, self._pause_s = 0.0, REPEAT_S

    def announce(self, now: float) -> None:
        """Say what is due, ever less often."""
        if (message := self._waiting()) and now >= self._due:
            self._due, self._pause_s = now + self._pause_s, min(2 * self._pause_s, REPEAT_MAX_S)
            self._send(message)

    def is_ready(self, key: str) -> bool:
        """Whether the update of the offer with this key can be masked."""
        return bool(self._state and self._state.key == key and self._state.inbox)

    def mask(self, numbers: Whole, grid: SumGrid) -> None:
        """Mask the numbers of the task, in place, once it is ready; WireError for a neighbour's key that is none."""
        state = self._state
        if state is None or state.group is None or state.inbox is None:
            raise WireError("there are no masks yet")
        there = {share.place for share in state.inbox.shares}
        masker = Masker(_scope(state), self._name, state.group.place, state.secret, state.seed)
        mask(numbers, masker, [peer for peer in state.group.peers if peer.place in there], grid)

    def take(self, message: MaskGroup | MaskInbox | MaskAsk) -> None:
        """Take what the aggregator says of a group.

        Raises:
            WireError: it is of another task or group, contradicts what was said before, or cannot be.
            ConfigError: nobody that this device trusts vouches for the keys of another: it can take no part.
        """
        state = self._state
        if state is None or message.task_id != state.task_id or message.round != state.round:
            raise WireError(f"masks of task {message.task_id[:64]!r}, which this device is not at")
        if isinstance(message, MaskGroup):
            self._join(state, message)
        elif state.group is None or message.group != state.group.group:
            raise WireError(f"masks of group {message.group!r}, which this device is not in")
        elif isinstance(message, MaskInbox):
            self._receive(state, state.group, message)
        else:
            self._answer(state, state.group, message)

    def forget(self) -> None:
        """Drop all secrets: nobody will ask any more."""
        self._state = None
        self._files.delete(FILE)

    @property
    def _name(self) -> str:
        return self._home.identity.device_id

    def _waiting(self) -> Message | None:
        """What is to be said until the aggregator's next word."""
        state = self._state
        if state is None or state.inbox:
            return None
        return state.shares if state.group else self._keys(state)

    def _keys(self, state: _State) -> MaskKeys:
        mask_key, share_key = public_of(state.secret), public_of(state.share_secret)
        vouched, scope = Vouched(), Scope(state.job, state.offered)
        if state.offered and (voucher := self._home.voucher):
            vouched = voucher.vouch(scope, self._name, mask_key, share_key)
        return MaskKeys(
            device_id=self._name,
            job=state.job,
            task_id=state.task_id,
            round=state.round,
            mask_key=mask_key,
            share_key=share_key,
            seed_digest=digest_of_seed(state.seed),
            **vouched._asdict(),
        )

    @property
    def _is_strict(self) -> bool:
        return self._home.mask_authorities is not None

    @property
    def _newest_key(self) -> str:
        return f"masks/{self._home.identity.job}"

    def _check_new(self, offer: Offer) -> None:
        """Raise ConfigError for a group that is none, or not newer than the last: told secrets of its keys would fit again."""
        if not self._is_strict:
            return
        newest = (self._home.outbox.recall(self._newest_key) or b"").decode()
        if (place := _place_of(offer.mask_group)) is None:
            raise ConfigError(
                "masks: the aggregator names no group of an attempt, which certificates vouch for; it is of an earlier release"
            )
        if place <= (_place_of(newest) or (-1, -1)):
            raise ConfigError(
                f"masks: keys for group {newest!r} of job {offer.job!r} were made before this one's, {offer.mask_group!r}; "
                "a job that begins anew needs another name"
            )

    def _check_peers(self, state: _State, group: MaskGroup) -> None:
        """Raise ConfigError that names whose keys nobody vouches for."""
        authorities = self._home.mask_authorities
        if authorities is None:
            return
        if group.group != state.offered:
            raise ConfigError(f"masks: group {group.group!r}; this device's keys are for {state.offered!r}")
        scope = Scope(state.job, group.group)
        told = [(p, problem_of_peer(scope, p) or authorities.problem(p.certificate)) for p in group.peers]
        if wrong := [f"{peer.device_id}: {problem}" for peer, problem in told if problem]:
            raise ConfigError(f"masks: the keys told of {some(wrong)}")

    def _join(self, state: _State, group: MaskGroup) -> None:
        """Share this device's secrets with those of a group."""
        if state.group:
            if state.group != group:
                raise WireError(f"group {group.group!r} is another than was told before")
            self.rush()
            return
        _check_group(group, name=self._name, mask_key=public_of(state.secret))
        self._check_peers(state, group)
        holders = [peer.place + 1 for peer in group.peers] + [group.place + 1]
        seeds, secrets = (split(one, holders, group.threshold) for one in (state.seed, state.secret))
        scope = Scope(state.job, group.group)
        sealed = [
            MaskShare(
                place=peer.place,
                data=seal(
                    seeds[peer.place + 1] + secrets[peer.place + 1],
                    state.share_secret,
                    peer.share_key,
                    scope,
                    sender=self._name,
                    receiver=peer.device_id,
                ),
            )
            for peer in group.peers
        ]
        header = {"job": state.job, "task_id": state.task_id, "round": state.round, "group": group.group}
        shares = MaskShares(device_id=self._name, **header, shares=sealed)  # type: ignore[arg-type]
        own = seeds[group.place + 1], secrets[group.place + 1]
        self._keep(msgspec.structs.replace(state, group=group, shares=shares, own=own))
        self.rush()

    def _receive(self, state: _State, group: MaskGroup, inbox: MaskInbox) -> None:
        """Keep what others have sealed for this device: it masks with them."""
        if state.inbox:
            if state.inbox != inbox:
                raise WireError("the group's shares are others than were told before")
            return
        places = [share.place for share in inbox.shares]
        known = {peer.place for peer in group.peers}
        if len(set(places)) != len(places) or not known.issuperset(places):
            raise WireError("shares of places that are not of this device's group, or twice")
        if len(places) < max(_FEWEST_PEERS, group.threshold - 1):
            raise WireError(
                f"{len(places)} others mask with this device; the group's threshold is {group.threshold}"
            )
        self._keep(msgspec.structs.replace(state, inbox=inbox))

    def _answer(self, state: _State, group: MaskGroup, ask: MaskAsk) -> None:
        """Tell what is asked of others' shares, if it is the first question or the same again."""
        if state.asked:
            if state.asked != ask:
                raise WireError(
                    "it asks for other shares than before: two kinds of one device would bare its update"
                )
        else:
            self._check_ask(state, group, ask)
            reveal = self._reveal(state, group, ask)
            blank = bytes(32)
            state = msgspec.structs.replace(
                state, asked=ask, reveal=reveal, secret=blank, share_secret=blank, seed=blank, own=(b"", b"")
            )
            self._keep(state)
        if state.reveal:
            self._send(state.reveal)

    def _check_ask(self, state: _State, group: MaskGroup, ask: MaskAsk) -> None:
        masked = {group.place, *(share.place for share in state.inbox.shares)} if state.inbox else set()
        named = [*ask.delivered, *ask.dropped]
        if len(set(named)) != len(named) or set(named) != masked:
            raise WireError("it does not ask for one share of each device that masked with this one")
        if group.place not in ask.delivered:
            raise WireError("it says that this device has dropped out, and asks it")
        if len(ask.delivered) < group.threshold:
            raise WireError(
                f"{len(ask.delivered)} updates around this device; its threshold is {group.threshold}"
            )

    def _reveal(self, state: _State, group: MaskGroup, ask: MaskAsk) -> MaskReveal:
        shares = {group.place: state.own, **self._opened(state, group)}
        header = {"job": state.job, "task_id": state.task_id, "round": state.round, "group": group.group}
        return MaskReveal(
            device_id=self._name,
            **header,  # type: ignore[arg-type]
            seeds=_told(ask.delivered, {place: seed for place, (seed, _) in shares.items()}),
            secrets=_told(ask.dropped, {place: secret for place, (_, secret) in shares.items()}),
        )

    def _opened(self, state: _State, group: MaskGroup) -> dict[int, tuple[bytes, bytes]]:
        """Shares of others by place; one that cannot be opened is left out."""
        peers = {peer.place: peer for peer in group.peers}
        found = {}
        for sealed in state.inbox.shares if state.inbox else ():
            try:
                found[sealed.place] = self._parted(state, peers[sealed.place], sealed.data)
            except WireError as exc:
                log.warning("round %d: %s", state.round, exc)
        return found

    def _parted(self, state: _State, peer: MaskPeer, sealed: bytes) -> tuple[bytes, bytes]:
        text = unseal(
            sealed,
            state.share_secret,
            peer.share_key,
            _scope(state),
            sender=peer.device_id,
            receiver=self._name,
        )
        if len(text) != 2 * SHARE_BYTES:
            raise WireError(f"shares of {peer.device_id!r} of {len(text)} bytes; expected {2 * SHARE_BYTES}")
        return text[:SHARE_BYTES], text[SHARE_BYTES:]

    def _keep(self, state: _State) -> None:
        self._state = state
        content = msgspec.msgpack.encode(state)
        self._files.write(FILE, sha256(content).digest() + content)

    def _send(self, message: Message) -> None:
        send(self._home.link, self._home.identity.up, encode(message))


def _scope(state: _State) -> Scope:
    return Scope(state.job, state.group.group if state.group else "")


def _place_of(group: str) -> tuple[int, int] | None:
    """Round and first position of an attempt, by which groups follow each other; None for a name that is none."""
    parts = group.split("-")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(str.isdecimal, parts)) else None


def _told(places: Sequence[int], shares: dict[int, bytes]) -> list[MaskShare]:
    return [MaskShare(place=place, data=shares[place]) for place in places if place in shares]


def _check_group(group: MaskGroup, *, name: str, mask_key: bytes) -> None:
    """Raise WireError for a group in which this device's update would not be hidden."""
    peers, holders = group.peers, len(group.peers) + 1
    if group.mask_key != mask_key:
        raise WireError("the aggregator knows another key of this device: it has lost its masks")
    if len(peers) < _FEWEST_PEERS:
        raise WireError(f"group with {len(peers)} others; at least {_FEWEST_PEERS}")
    if not holders < 2 * group.threshold <= 2 * holders:
        raise WireError(
            f"threshold {group.threshold} of {holders}: more than half, and no more than there are"
        )
    places = {group.place, *(peer.place for peer in peers)}
    names = {name, *(peer.device_id for peer in peers)}
    keys = {mask_key, *(peer.mask_key for peer in peers)}
    if min(len(places), len(names), len(keys), len({peer.share_key for peer in peers}) + 1) != holders:
        raise WireError("group with a place, device or key twice")


def _parsed(content: bytes | None) -> _State | None:
    if not content:
        return None
    try:
        if sha256(content[32:]).digest() == content[:32]:
            return msgspec.msgpack.decode(content[32:], type=prepared(_State))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    log.warning("%s: damaged; this device takes no part in the masks of its last round", FILE)
    return None
