"""The key of an offer: by it a device knows what it is at, or has done, again."""

from collections.abc import Mapping
from hashlib import sha256

import msgspec

from fleetune.device_runtime.agent.held_adapters import wanted_sha256
from fleetune.device_runtime.contracts.wire import Offer
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec

_Parts = Mapping[type, tuple[str, ...]]

_PARTS: _Parts = {
    LocalWork: (
        "policy", "optimizer", "steps", "epochs", "batch_size", "seq_len", "seed", "codec", "codec_ratio", "rounds_before",
    ),
    PolicySpec: ("name", "drop", "shape", "period"),
    OptimizerSpec: ("name", "lr", "weight_decay", "warmup_steps", "decay", "clip_norm", "proximal"),
}  # fmt: skip
"""Fields that every key is made of, in the order of keys that are on disks; of all others only those that say something."""
_PARTS_OF_0_1: _Parts = {
    LocalWork: ("policy", "optimizer", "steps", "epochs", "batch_size", "seq_len", "seed", "codec", "rounds_before"),
    PolicySpec: ("name", "drop", "shape", "period"),
    OptimizerSpec: ("name", "lr", "weight_decay", "warmup_steps", "decay", "clip_norm"),
}  # fmt: skip


_NEWER: Mapping[type, Mapping[str, object]] = {
    kind: {n: value for n, value in msgspec.structs.asdict(kind()).items() if n not in names}
    for kind, names in _PARTS.items()
}
"""The others, with their defaults."""


def key_of(offer: Offer) -> str:
    """Key of all that decides what comes of an offer; a field at a default that is newer than the key leaves it as it was."""
    work = _told(offer.work, _PARTS, is_newer_told=True)
    more: list[object] = [said for said in (offer.mask_sha256, offer.memory, offer.lazy) if said]
    more += [offer.grid] if offer.grid.bits else []
    return _digest((offer.job, offer.task_id, offer.version, offer.role, work, wanted_sha256(offer), *more))


def key_of_0_1(offer: Offer) -> str:
    """Key that release 0.1.0 gave an offer: by its round, and by the fields that work had then."""
    work = _told(offer.work, _PARTS_OF_0_1, is_newer_told=False)
    return _digest((offer.job, offer.round, offer.version, offer.role, work, wanted_sha256(offer)))


def _told(value: object, parts: _Parts, *, is_newer_told: bool) -> object:
    if not isinstance(value, msgspec.Struct):
        return value
    names = parts[type(value)]
    if is_newer_told:
        newer = _NEWER[type(value)].items()
        names = (*names, *(name for name, default in newer if getattr(value, name) != default))
    return {name: _told(getattr(value, name), parts, is_newer_told=is_newer_told) for name in names}


def _digest(same: object) -> str:
    return sha256(msgspec.msgpack.encode(same)).hexdigest()[:16]
