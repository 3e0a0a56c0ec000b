"""``int8``: differences in 255 steps, one scale for each group of elements; no memory."""

import numpy as np

from fleetune.device_runtime.arrays import Floats
from fleetune.device_runtime.contracts.codecs.codec import Doubles, difference, tensorwise
from fleetune.device_runtime.errors import WireError

GROUP = 256
"""Elements that share one scale."""


def _encode(value: Floats, reference: Floats) -> tuple[bytes, Doubles]:
    flat = difference(value, reference).reshape(-1)
    groups = np.zeros((_num_groups(flat.size), GROUP))
    groups.reshape(-1)[: flat.size] = flat
    peaks = np.abs(groups).max(axis=1)  # (groups,)
    # Rounded up, so that the peak itself never falls outside the 127 steps.
    scales = np.where(peaks > 0, np.nextafter((peaks / 127).astype("<f4"), np.float32(np.inf)), 0).astype(
        "<f4"
    )
    steps = np.divide(groups, scales[:, None], out=np.zeros_like(groups), where=scales[:, None] > 0)
    quantised = np.rint(steps).astype(np.int8).reshape(-1)[: flat.size]
    return bytes(scales.tobytes() + quantised.tobytes()), _value(scales, quantised, reference)


def _decode(part: bytes, reference: Floats) -> Doubles:
    expected, num_groups = _size_bytes(reference.size), _num_groups(reference.size)
    if len(part) != expected:
        raise WireError(f"{len(part)} bytes of int8, expected {expected}")
    scales = np.frombuffer(part, "<f4", count=num_groups)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise WireError("int8: a scale is negative or not finite")
    return _value(scales, np.frombuffer(part, np.int8, offset=4 * num_groups), reference)


def _value(scales: Floats, steps: np.typing.NDArray[np.int8], reference: Floats) -> Doubles:
    moved = steps * np.repeat(scales.astype(np.float64), GROUP)[: reference.size]
    return np.asarray(reference + moved.reshape(reference.shape))


def scale_bytes(count: int) -> int:
    """Bytes of a part that are scales."""
    return 4 * _num_groups(count)


def _num_groups(count: int) -> int:
    return -(-count // GROUP)


def _size_bytes(count: int) -> int:
    return scale_bytes(count) + count


int8 = tensorwise("int8", encode=_encode, decode=_decode, size_bytes_max=_size_bytes)
