"""The Gaussian mechanism: a change of bounded L2 norm, and normal noise that nobody else can make again.

Noise is never drawn from ``draws``, which anybody repeats. Its bytes come from a :data:`Source`: the operating system, or a
secret that was drawn there, expanded.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from itertools import count
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.contracts.codecs.codec import Doubles

Source = Callable[[int], bytes]
"""n -> the next n bytes, each as likely as another."""
NOISE_SECRET = "noise.key"
"""File of what a device's noise is made from."""
SECRET_BYTES = 32
"""Of a secret that noise is expanded from."""

_PURPOSE = b"fleetune noise 1"
_BLOCK = 2**16
_SUMMED = 4
"""Normal numbers in one element of noise."""
_ROUNDING = 1 - 2.0**-40
"""Keeps what is scaled at or below the bound, whatever its rounding in float64."""


class Bounded(NamedTuple):
    """A change that keeps to a bound."""

    change: Mapping[str, Doubles]
    norm: float
    """L2 norm of the whole before."""
    scale: float
    """What it was multiplied by: 1 where the bound does not bind, and then the values are the very same arrays."""


def bounded(change: Mapping[str, Doubles], norm_max: float) -> Bounded:
    """Scale a change to an L2 norm of at most ``norm_max``, over all elements of all tensors together, in float64.

    Source: DP-FedAvg, McMahan et al., arXiv 1710.06963, section 3 (flat clipping).
    """
    norm = math.sqrt(sum(float(np.square(change[name]).sum()) for name in sorted(change)))
    if norm <= norm_max:
        return Bounded(change, norm, 1.0)
    scale = norm_max / norm * _ROUNDING
    return Bounded({name: np.asarray(scale * value) for name, value in change.items()}, norm, scale)


def change_of(values: Mapping[str, Array], reference: Mapping[str, Array]) -> dict[str, Doubles]:
    """Return ``values - reference`` in float64, by the names of ``values``."""
    return {n: np.subtract(value, reference[n], dtype=np.float64) for n, value in values.items()}


def gaussian(shape: tuple[int, ...], source: Source) -> Doubles:
    """Draw independent standard normal numbers, float64.

    Box and Muller's, from 53 random bits a number. Each element is half the sum of four: their rounding then gives away
    nothing that could be searched for.

    Source: Holohan and Braghin, arXiv 2107.10138, section 4.
    """
    flat = np.empty(math.prod(shape))
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        part[:] = _block(part.size, source)
    return flat.reshape(shape)


def derived(*parts: bytes) -> Source:
    """Expand a secret, the first of ``parts``, for the purpose that the others name: equal parts give equal bytes.

    SHAKE-256 over all parts, each with its length, and a counter.
    """
    key = b"".join(len(part).to_bytes(8, "big") + part for part in (_PURPOSE, *parts))
    numbers = count()
    return lambda size: hashlib.shake_256(key + next(numbers).to_bytes(8, "big")).digest(size)


def new_secret() -> bytes:
    """Draw a secret from the operating system."""
    return os.urandom(SECRET_BYTES)


def _block(size: int, source: Source) -> Doubles:
    pairs = _SUMMED // 2 * size
    bits = np.frombuffer(source(16 * pairs), "<u8").reshape(2, pairs) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((bits[0] + 1.0) * 2.0**-53))
    angle = (2.0 * math.pi * 2.0**-53) * bits[1]
    # The sines go one element on: of one radius no element has both.
    both = np.concatenate([radius * np.cos(angle), np.roll(radius * np.sin(angle), 1)])
    return np.asarray(both.reshape(_SUMMED, size).sum(0) / math.sqrt(_SUMMED))
