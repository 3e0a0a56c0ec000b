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
        owed = {name: _owed(value, residual.get(name)) for name, value in values.items()}
        wanted = {name: floats(value) for name, value in owed.items()}
        check_tensors(wanted, reference)
        coded = codec.encode(wanted, reference, _known(memory, codec.sender))
        left = {name: np.asarray(owed[name] - coded.conveyed[name]) for name in owed}
        untouched = {name: value for name, value in residual.items() if name not in values}
        kept = {**untouched, **{name: value for name, value in left.items() if value.any()}}
        return coded._replace(memory={**coded.memory, **as_kind(RESIDUAL, kept)})

    return codec._replace(encode=encode, sender=(*codec.sender, RESIDUAL))


def _owed(value: Array, residual: Array | None) -> Doubles:
    wide = np.asarray(value, np.float64)
    # Adding a zero residual would turn -0.0 into 0.0, and fp32 conveys every bit.
    return wide if residual is None else np.asarray(wide + np.asarray(residual, np.float64))


def _known(memory: Memory, kinds: tuple[str, ...]) -> Memory:
    return {name: value for name, value in memory.items() if name.split("/", 1)[0] in kinds}
