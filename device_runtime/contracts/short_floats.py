"""Float32 with few bits of its own: the lowest are those of a reference, and so nothing in a difference to the bit."""

import numpy as np

from fleetune.device_runtime.arrays import Array, Floats
from fleetune.device_runtime.contracts.codecs.codec import floats

_SIGNIFICAND = 23
_INFINITE = 0x7F800000


def shortened(value: Array, like: Array, bits: int) -> Floats:
    """Round to the float32, nearest in units of the last place, whose lowest ``23 - bits`` bits are those of ``like``.

    With ``like`` of zeros that is rounding to ``bits`` bits of significand, half up in magnitude.

    Args:
        value: finite, taken as float32.
        like: of the same shape, taken as float32.
        bits: of the significand that are the value's own, 0 to 23. It moves by 2^-bits of itself at most, and with none below
            2^-126 by as much as that.
    """
    own, step = floats(value).view("<u4").astype(np.int64), 1 << (_SIGNIFICAND - bits)
    magnitude, lowest = own & 0x7FFFFFFF, floats(like).view("<u4").astype(np.int64) & (step - 1)
    steps = np.maximum((magnitude - lowest + step // 2) // step, 0)
    near = lowest + step * steps
    near = np.where(near < _INFINITE, near, near - step) | (own & 0x80000000)
    found: Floats = near.astype("<u4").view("<f4")
    return found
