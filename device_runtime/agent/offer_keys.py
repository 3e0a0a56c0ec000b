"""The key of an offer: by it a device knows what it is at, or has done, again."""

from hashlib import sha256

import msgspec

from fleetune.device_runtime.agent.held_adapters import wanted_sha256
from fleetune.device_runtime.contracts.wire import Offer, OptimizerSpec, PolicySpec

_WORK_OF_0_1 = (
    "policy", "optimizer", "steps", "epochs", "batch_size", "seq_len", "seed", "codec", "rounds_before",
)  # fmt: skip
_PARTS_OF_0_1: dict[type, tuple[str, ...]] = {
    PolicySpec: ("name", "drop", "shape", "period"),
    OptimizerSpec: ("name", "lr", "weight_decay", "warmup_steps", "decay", "clip_norm"),
}


def key_of(offer: Offer) -> str:
    """Key of all that decides what comes of an offer."""
    same = (offer.job, offer.task_id, offer.version, offer.role, offer.work, wanted_sha256(offer))
    return _digest(same)


def key_of_0_1(offer: Offer) -> str:
    """Key that release 0.1.0 gave an offer: by its round, and by the fields that work had then."""
    work = {name: _told(getattr(offer.work, name)) for name in _WORK_OF_0_1}
    return _digest((offer.job, offer.round, offer.version, offer.role, work, wanted_sha256(offer)))


def _told(value: object) -> object:
    fields = _PARTS_OF_0_1.get(type(value))
    return {name: getattr(value, name) for name in fields} if fields else value


def _digest(same: object) -> str:
    return sha256(msgspec.msgpack.encode(same)).hexdigest()[:16]
