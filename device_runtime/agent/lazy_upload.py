"""What is sent of an update whose innovation is worth no upload: that the last one counts again."""

from collections.abc import Mapping

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.codecs import Codec, Packed, chain_of, pack
from fleetune.device_runtime.contracts.codecs.codec import Memory, as_kind, of_kind
from fleetune.device_runtime.contracts.codecs.feedback import RESIDUAL
from fleetune.device_runtime.contracts.codecs.innovation import (
    LAST,
    SKIPS_MAX,
    is_lazy,
    repeating,
    skips_of,
)


def spared(
    packed: Packed, codec: Codec, reference: Arrays, *, memory: Memory, bound: float, reference_sha256: str
) -> Packed | None:
    """Return what goes in the place of ``packed``; None if that is to be sent.

    Args:
        packed: the update, with feedback.
        codec: that it is in.
        reference: what it is a difference from.
        memory: the codec's before it; what both sides know of it is the same.
        bound: the offer's ``lazy``.
        reference_sha256: as of :func:`pack`.

    What was owed before is owed still: nothing of the update is, as in LAQ.
    """
    before, after = of_kind(LAST, memory), of_kind(LAST, packed.memory)
    told = {name: reference[name] for name in packed.conveyed}
    is_known = before.keys() == told.keys() and all(before[n].shape == told[n].shape for n in told)
    if not (chain_of(memory) and is_known and skips_of(memory) < SKIPS_MAX):
        return None
    step = {name: after[name].astype(np.float64) - before[name].astype(np.float64) for name in told}
    owed, left = (of_kind(RESIDUAL, kept) for kept in (memory, packed.memory))
    if not is_lazy(_norm2(step), _norm2(owed) + _norm2(left), bound):
        return None
    found = pack(repeating(codec), told, reference, memory=memory, reference_sha256=reference_sha256)
    return found._replace(memory={**found.memory, **as_kind(RESIDUAL, owed)})


def _norm2(arrays: Mapping[str, Array]) -> float:
    return float(sum(np.square(value, dtype=np.float64).sum() for _, value in sorted(arrays.items())))
