"""Updates as whole numbers on a public grid: their sum over devices, modulo a power of two, is exact in any order.

An element's change is cut to a public range, rounded at random to ``bits`` bits and multiplied by the device's weight; the weight
itself is one more element, the last. Zeros stand for what a device did not train.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.contracts.work import SumGrid
from fleetune.device_runtime.draws import Key, words
from fleetune.device_runtime.errors import ConfigError, WireError

Whole = NDArray[np.uint64]
MODULUS_BITS_MAX = 62
_PIECE = 2**16
"""Elements worked on at a time."""


class Placed(NamedTuple):
    """A device's numbers, and how many of its changes the range has cut."""

    numbers: Whole
    """(n + 1,), below 2 ** modulus_bits."""
    num_cut: int


def modulus_bits(grid: SumGrid) -> int:
    """Bits of one element of a sum; ConfigError for a grid that has none, or too many."""
    bits = grid.bits + grid.weight_bits + grid.summands.bit_length()
    if grid.bits < 2 or grid.summands < 1 or grid.limit <= 0 or bits > MODULUS_BITS_MAX:
        raise ConfigError(
            f"grid of {grid.bits} bits, {grid.weight_bits} of weight, {grid.summands} devices and range {grid.limit:g}: "
            f"expected 2 bits or more, at least one device, and at most {MODULUS_BITS_MAX} bits in all"
        )
    return bits


def weight_of(grid: SumGrid, num_samples: int) -> int:
    """Weight of a device: its samples, as many as the grid can tell; 1 of every device if it tells none."""
    return min(max(num_samples, 1), 2**grid.weight_bits - 1) if grid.weight_bits else 1


def placed(
    values: Mapping[str, Array], reference: Mapping[str, Array], grid: SumGrid, *, weight: int, seed: int
) -> Placed:
    """Put a device's update on the grid.

    Args:
        values: what it trained, float32, any subset of the reference's tensors.
        reference: what the update starts from, float32 by tensor: all of a job's devices have these names and shapes.
        grid: the job's.
        weight: as of :func:`weight_of`.
        seed: of the rounding.

    Raises:
        WireError: a value that is not finite, or of another shape (all listed).
    """
    if problems := [*_problems(values, reference)]:
        raise WireError("cannot pack: " + "; ".join(problems))
    steps = _changes(values, reference)
    steps *= 2.0 ** (grid.bits - 1) / grid.limit
    _round(steps, seed)
    most = _levels(grid)
    num_cut = int(np.count_nonzero(np.abs(steps) > most))
    whole = np.append(np.clip(steps, -most, most).astype(np.int64) * weight, np.int64(weight))
    return Placed(whole.view(np.uint64) & _below(grid), num_cut)


def added(total: Whole, numbers: Whole, grid: SumGrid, *, sign: int = 1) -> None:
    """Add numbers to a total, or take them away, modulo the grid's power of two; in place."""
    (np.add if sign > 0 else np.subtract)(total, numbers, out=total)
    reduced(total, grid)


def reduced(numbers: Whole, grid: SumGrid) -> None:
    """Reduce numbers modulo the grid's power of two, in place."""
    np.bitwise_and(numbers, _below(grid), out=numbers)


def mean_change(
    total: Whole, reference: Mapping[str, Array], grid: SumGrid, *, num_devices: int
) -> dict[str, NDArray[np.float64]]:
    """Return the weighted mean of what ``num_devices`` devices changed, float64 by tensor.

    Raises:
        WireError: these devices cannot have such a sum: one of them has sent something else. A lie within the range is not seen.
    """
    most, weight = _levels(grid), int(total[-1])
    sums = _signed(total[:-1], grid)
    if not num_devices <= weight <= num_devices * weight_of(grid, 2**62):
        raise WireError(f"implausible sum: a weight of {weight} of {num_devices} devices")
    if sums.size and int(np.abs(sums).max()) > weight * most:
        raise WireError("implausible sum: a mean beyond the range of the grid")
    means = sums / np.float64(weight) * (grid.limit / 2.0 ** (grid.bits - 1))
    return {name: part.reshape(reference[name].shape) for name, part in _parts(means, reference)}


def write_numbers(numbers: Whole, grid: SumGrid) -> bytes:
    """Pack numbers side by side, lowest bits first."""
    width = modulus_bits(grid)
    pieces = [numbers[i : i + _PIECE] for i in range(0, numbers.size, _PIECE)]
    return b"".join(_packed(np.ascontiguousarray(piece), width) for piece in pieces)


def read_numbers(payload: bytes, reference: Mapping[str, Array], grid: SumGrid) -> Whole:
    """Unpack the numbers of an update of ``reference``'s tensors; WireError if it has another length."""
    if len(payload) != (expected := payload_bytes(reference, grid)):
        raise WireError(f"masked update of {len(payload)} bytes; this adapter's has {expected}")
    width, count = modulus_bits(grid), num_elements(reference)
    starts = range(0, count, _PIECE)
    data = np.frombuffer(payload, np.uint8)
    pieces = [_unpacked(data[i * width // 8 :], width, min(_PIECE, count - i)) for i in starts]
    return np.concatenate(pieces)


def check_numbers(numbers: Whole, grid: SumGrid) -> None:
    """Raise WireError for numbers of one device, unmasked, that it cannot have."""
    mean_change(numbers, {"update": np.empty(numbers.size - 1)}, grid, num_devices=1)


def payload_bytes(reference: Mapping[str, Array], grid: SumGrid) -> int:
    """Length of an update of ``reference``'s tensors."""
    return -(-num_elements(reference) * modulus_bits(grid) // 8)


def num_elements(reference: Mapping[str, Array]) -> int:
    """Numbers of an update: one for each element, and the weight."""
    return sum(value.size for value in reference.values()) + 1


def _problems(values: Mapping[str, Array], reference: Mapping[str, Array]) -> Iterator[str]:
    for name, value in sorted(values.items()):
        if name not in reference:
            yield f"{name}: not in the reference"
        elif value.shape != reference[name].shape:
            yield f"{name}: shape {list(value.shape)}, the reference has {list(reference[name].shape)}"
        elif not np.isfinite(value).all():
            yield f"{name}: not finite"


def _changes(values: Mapping[str, Array], reference: Mapping[str, Array]) -> NDArray[np.float64]:
    """(n,) of all tensors by name; zeros for those without a value."""
    changes = np.zeros(num_elements(reference) - 1, np.float64)
    for name, part in _parts(changes, reference):
        if name in values:
            np.subtract(values[name].reshape(-1), reference[name].reshape(-1), out=part, dtype=np.float64)
    return changes


def _parts(
    flat: NDArray[np.float64], reference: Mapping[str, Array]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    start = 0
    for name in sorted(reference):
        yield name, flat[start : start + reference[name].size]
        start += reference[name].size


def _round(steps: NDArray[np.float64], seed: int) -> None:
    """Round at random, in place: up as often as a step is beyond the whole number below it."""
    for i in range(0, steps.size, _PIECE):
        piece = steps[i : i + _PIECE]
        piece += words(Key(seed, "rounding", i // _PIECE, 1), piece.size) / 2.0**32
        np.floor(piece, out=piece)


def _levels(grid: SumGrid) -> int:
    return int(2 ** (grid.bits - 1)) - 1


def _below(grid: SumGrid) -> np.uint64:
    return np.uint64(2 ** modulus_bits(grid) - 1)


def _signed(numbers: Whole, grid: SumGrid) -> NDArray[np.int64]:
    up = np.uint64(64 - modulus_bits(grid))
    return (numbers << up).view(np.int64) >> np.int64(up)


def _packed(numbers: Whole, width: int) -> bytes:
    bits = np.unpackbits(numbers.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    return np.packbits(bits[:, :width].reshape(-1), bitorder="little").tobytes()


def _unpacked(data: NDArray[np.uint8], width: int, count: int) -> Whole:
    bits = np.unpackbits(data[: -(-count * width // 8)], count=count * width, bitorder="little")
    wide = np.zeros((count, 64), np.uint8)
    wide[:, :width] = bits.reshape(count, width)
    return np.packbits(wide, axis=1, bitorder="little").view("<u8").reshape(-1).astype(np.uint64)
