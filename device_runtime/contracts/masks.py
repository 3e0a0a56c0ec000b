"""Masks of an adapter's elements: one bit each, agreed on by all devices of a job; what is not set does not travel.

Both ends cut an update to the elements that are set before any codec sees it, and put them in their place after it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.errors import WireError

Mask = Mapping[str, NDArray[np.bool_]]
"""By tensor, in its shape; a tensor of which nothing is set is absent. Empty: no mask, all elements travel."""


def mask_bytes(like: Mapping[str, Array]) -> int:
    """Length of a mask of these tensors."""
    return (sum(value.size for value in like.values()) + 7) // 8


def mask_of(bits: NDArray[np.bool_], like: Mapping[str, Array]) -> Mask:
    """Return the mask whose bits, of all tensors by name one after another in C order, are ``bits``."""
    names = sorted(like)
    pieces = np.split(bits, np.cumsum([like[name].size for name in names])[:-1])
    shaped = {n: piece.reshape(like[n].shape) for n, piece in zip(names, pieces, strict=True)}
    return {name: piece for name, piece in shaped.items() if piece.any()}


def write_mask(mask: Mask, like: Mapping[str, Array]) -> bytes:
    """Mask to bytes: a bit for each element in the order of :func:`mask_of`, the lowest of a byte first."""
    blank = {name: np.zeros(like[name].shape, bool) for name in sorted(like)}
    bits = [mask.get(name, piece).reshape(-1) for name, piece in blank.items()]
    return np.packbits(np.concatenate(bits), bitorder="little").tobytes()


def read_mask(content: bytes, like: Mapping[str, Array]) -> Mask:
    """Bytes to a mask; WireError if they are not as many as these tensors have, or nothing is set."""
    count = sum(value.size for value in like.values())
    bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little").astype(bool)
    if len(content) != mask_bytes(like) or bits[count:].any():
        raise WireError(f"mask of {len(content)} bytes; {count} elements have {mask_bytes(like)}")
    if not bits.any():
        raise WireError("mask: no element is set")
    return mask_of(bits[:count], like)


def masked(arrays: Mapping[str, Array], mask: Mask) -> Arrays:
    """Return the elements of each tensor that are set, (count,) in C order; all of them without a mask."""
    return {name: value[mask[name]] for name, value in arrays.items() if name in mask} if mask else {**arrays}


def filled(
    values: Mapping[str, NDArray[Any]], reference: Mapping[str, Array], mask: Mask
) -> dict[str, NDArray[np.float64]]:
    """Return ``values`` in the shapes of ``reference``, float64, with its elements where the mask has none."""
    if not mask:
        return {**values}
    found = {name: np.array(reference[name], np.float64) for name in values}
    for name, value in values.items():
        found[name][mask[name]] = value
    return found
