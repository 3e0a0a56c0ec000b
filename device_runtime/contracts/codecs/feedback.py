"""Error feedback: what a payload could not convey is added to the next one.

Source: Karimireddy et al., Error Feedback Fixes SignSGD, arXiv 1901.09847.
"""

import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.contracts.codecs.codec import (
    Codec,
    Doubles,
    Encoded,
    Memory,
    Numbers,
    Tensors,
    as_kind,
    check_tensors,
    floats,
    of_kind,
)

RESIDUAL = "residual"
"""Kind of memory: float64 by tensor, only those in which something is left."""


def with_feedback(codec: Codec) -> Codec:
    """Let a sender remember what ``codec`` could not convey; what receivers see of it is ``codec``.

    Conveyed difference plus new residual is the difference plus the old residual. A residual of a tensor that is not
    sent is kept. Memory of kinds that neither knows, left by another codec, is dropped.
    """

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        residual = of_kind(RESIDUAL, memory)
        check_tensors(residual, reference)
        # What nothing is owed of stays as it is: adding a zero would turn -0.0 into 0.0, and fp32 conveys every bit.
        owed = {name: _sum(values[name], value) for name, value in residual.items() if name in values}
        wanted = {name: floats(owed.get(name, value)) for name, value in values.items()}
        check_tensors({name: wanted[name] for name in owed}, reference)
        coded = codec.encode(wanted, reference, _known(memory, codec.sender))
        lossy = [name for name in values if name in owed or coded.conveyed[name] is not wanted[name]]
        left = {name: _left(owed.get(name, values[name]), coded.conveyed[name]) for name in lossy}
        untouched = {name: value for name, value in residual.items() if name not in values}
        kept = {**untouched, **{name: value for name, value in left.items() if value.any()}}
        return coded._replace(memory={**coded.memory, **as_kind(RESIDUAL, kept)})

    return codec._replace(encode=encode, sender=(*codec.sender, RESIDUAL))


def _sum(value: Array, owed: Array) -> Doubles:
    return np.asarray(np.asarray(value, np.float64) + np.asarray(owed, np.float64))


def _left(wanted: Array, conveyed: Numbers) -> Doubles:
    return np.asarray(np.asarray(wanted, np.float64) - np.asarray(conveyed, np.float64))


def _known(memory: Memory, kinds: tuple[str, ...]) -> Memory:
    return {name: value for name, value in memory.items() if name.split("/", 1)[0] in kinds}
