"""``fp32`` sends the values themselves, ``fp16`` differences in half precision; neither has memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Floats
from fleetune.device_runtime.contracts.codecs.codec import Doubles, difference, tensorwise
from fleetune.device_runtime.contracts.codecs.halves import halved
from fleetune.device_runtime.errors import WireError


def _fp32_encode(value: Floats, reference: Floats) -> tuple[bytes, Floats]:
    return value.tobytes(), value


def _fp32_decode(part: bytes, reference: Floats) -> Floats:
    return _numbers(part, "<f4", reference, codec="fp32")


def _fp16_encode(value: Floats, reference: Floats) -> tuple[bytes, Doubles]:
    halves, steps = halved(difference(value, reference).reshape(-1), what="a difference", codec="fp16")
    return halves.tobytes(), np.asarray(reference + steps.reshape(reference.shape))


def _fp16_decode(part: bytes, reference: Floats) -> Doubles:
    value = _numbers(part, "<f2", reference, codec="fp16").astype(np.float64)
    value += reference
    return value


def _numbers(part: bytes, dtype: str, reference: Floats, *, codec: str) -> NDArray[Any]:
    """View a part as numbers in the shape of ``reference``."""
    expected = np.dtype(dtype).itemsize * reference.size
    if len(part) != expected:
        raise WireError(f"{len(part)} bytes of {codec}, expected {expected}")
    return np.frombuffer(part, dtype).reshape(reference.shape)


fp32 = tensorwise("fp32", encode=_fp32_encode, decode=_fp32_decode, size_bytes_max=lambda count: 4 * count)
fp16 = tensorwise("fp16", encode=_fp16_encode, decode=_fp16_decode, size_bytes_max=lambda count: 2 * count)
