"""A codec: pure functions between a set of tensors and bytes, with named memory on either side."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Arrays, Floats
from fleetune.device_runtime.errors import ConfigError, WireError

Doubles = NDArray[np.float64]
_FLOAT = np.dtype("<f4")
_F = TypeVar("_F", np.float32, np.float64)
Tensors = Mapping[str, Floats]
"""By name, float32, finite."""
Memory = Mapping[str, Array]
"""What one side keeps from payload to payload, flat: ``kind/tensor`` -> array; empty at first, safetensors can hold it."""
CHAIN = "chain"
"""Kind of memory by which both sides of a codec with a receiver's memory see that they have the same."""
Shapes = Mapping[str, tuple[int, ...]]
Numbers = Doubles | Floats
"""Float64, or float32 where no value has more bits; such a one may view what it was made of, and is not to be written."""


BY_TENSOR, BY_KIND = 1, 2
"""Versions of the frame around parts: one for each tensor, or for each kind of content, of all tensors in the order of names."""


class Encoded(NamedTuple):
    """What a sender has of a set of tensors."""

    parts: dict[str, bytes]
    """What travels, as the codec's frame has it; the frame adds names and shapes."""
    conveyed: Mapping[str, Numbers]
    """To the bit what ``decode`` gives the receiver."""
    memory: Arrays
    """The sender's, for next time."""


class Decoded(NamedTuple):
    """What a receiver has of a payload."""

    values: Mapping[str, Numbers]
    memory: Arrays
    """The receiver's, for next time."""


Encode = Callable[[Tensors, Tensors, Memory], Encoded]


class Codec(NamedTuple):
    """One way to send a set of tensors; both sides hold the same reference, of the same shapes."""

    name: str
    encode: Encode
    """(values, reference, memory) -> Encoded. ``values`` are any subset of the reference's tensors; equal arguments
    give equal bytes. WireError for values that it cannot hold."""
    decode: Callable[[Mapping[str, bytes], Tensors, Memory], Decoded]
    """(parts, reference, memory) -> Decoded, of the reference's shapes; WireError if it cannot be. The reference
    is cut to the tensors that came, in the order of their names."""
    size_bytes_max: Callable[[Shapes], int]
    """Length that the parts of tensors of these shapes, or of fewer, never exceed together."""
    sender: tuple[str, ...] = ()
    """Kinds of memory that ``encode`` keeps."""
    receiver: tuple[str, ...] = ()
    """Kinds of memory that ``decode`` keeps."""
    frame: int = BY_TENSOR
    encode_nearest: Encode | None = None
    """As ``encode``, without draws: each element to the nearest that can be sent. None where ``encode`` has no draws."""


def by_nearest(codec: Codec) -> Codec:
    """Round to the nearest: for a sender that sends later what was lost, whose errors need not be right on average."""
    return codec._replace(encode=codec.encode_nearest or codec.encode)


def tensorwise(
    name: str,
    *,
    encode: Callable[[Floats, Floats], tuple[bytes, Numbers]],
    decode: Callable[[bytes, Floats], Numbers],
    size_bytes_max: Callable[[int], int],
) -> Codec:
    """Make a codec that knows one tensor at a time, and no memory.

    Args:
        name: of the codec.
        encode: (value, reference) -> (part, what it conveys).
        decode: (part, reference) -> value, of the reference's shape.
        size_bytes_max: number of elements -> length that no part exceeds.
    """

    def encode_all(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        pairs = {n: encode(value, reference[n]) for n, value in values.items()}
        parts = {n: part for n, (part, _) in pairs.items()}
        return Encoded(parts, {n: conveyed for n, (_, conveyed) in pairs.items()}, {})

    def decode_all(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        return Decoded({n: _named(n, decode, part, reference[n]) for n, part in parts.items()}, {})

    def bound(shapes: Shapes) -> int:
        return sum(size_bytes_max(count_of(shape)) for shape in shapes.values())

    return Codec(name, encode_all, decode_all, bound)


def joined(tensors: Tensors, names: Iterable[str]) -> Floats:
    """Elements of tensors, one after the other, as one flat array."""
    return np.concatenate([np.zeros(0, "<f4"), *(tensors[name].reshape(-1) for name in names)])


def moved(values: Tensors, reference: Tensors) -> Floats:
    """Differences from the reference in float32, joined in the order of names."""
    steps = np.empty(sum(value.size for value in values.values()), "<f4")
    with np.errstate(over="ignore"):
        for name, step in parted(steps, values, sorted(values)).items():
            np.subtract(values[name], reference[name], out=step)
    return steps


def shifted(reference: Tensors, steps: Floats, names: Iterable[str]) -> dict[str, Doubles]:
    """Reference plus joined steps, in float64, by tensor."""
    # An array for each: one for all is fresh memory at every call, which costs more than the sums.
    moves = parted(steps, reference, names)
    return {name: np.add(reference[name], step, dtype=np.float64) for name, step in moves.items()}


def parted(flat: NDArray[_F], reference: Tensors, names: Iterable[str]) -> dict[str, NDArray[_F]]:
    """Views of a joined array, by tensor."""
    found, start = {}, 0
    for name in names:
        value = reference[name]
        found[name] = flat[start : start + value.size].reshape(value.shape)
        start += value.size
    return found


def floats(value: Array) -> Floats:
    """Float32, little-endian; what is beyond its range becomes infinite."""
    if isinstance(value, np.ndarray) and value.dtype == _FLOAT and value.flags.c_contiguous:
        return np.asarray(value, _FLOAT)
    with np.errstate(over="ignore"):
        return np.asarray(value, dtype=_FLOAT, order="C")


def difference(value: Floats, reference: Floats) -> Doubles:
    """``value - reference``, exact in float64 but for its rounding."""
    return np.asarray(np.float64(value) - np.float64(reference))


def count_of(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)


def of_kind(kind: str, memory: Memory) -> Arrays:
    """Arrays of one kind of memory, by tensor."""
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): value for name, value in memory.items() if name.startswith(prefix)}


def as_kind(kind: str, arrays: Mapping[str, Array]) -> Arrays:
    """Arrays by tensor as one kind of memory."""
    return {f"{kind}/{name}": np.asarray(value) for name, value in arrays.items()}


def chain_of(memory: Memory) -> str:
    """Digest, in hexadecimal, of the payloads that made a memory which both sides keep; empty for none."""
    found = memory.get(f"{CHAIN}/")
    return "" if found is None else np.asarray(found, np.uint8).tobytes().hex()


def check_tensors(values: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
    """Raise WireError that lists every tensor unknown to the reference, of another shape or not finite."""
    problems = [f"{name}: not in the reference" for name in sorted(values.keys() - reference.keys())]
    for name in sorted(values.keys() & reference.keys()):
        value, held = values[name], reference[name]
        if value.shape != held.shape:
            problems.append(f"{name}: shape {list(value.shape)}, the reference has {list(held.shape)}")
        elif not (np.isfinite(value).all() and np.isfinite(held).all()):
            problems.append(f"{name}: not finite")
    if problems:
        raise WireError("cannot pack: " + "; ".join(problems))


def check_no_ratio(name: str, ratio: float) -> None:
    """Raise ConfigError if a codec that sends every element is given a ratio other than 1, or 0 for none."""
    if ratio not in (0.0, 1.0):
        raise ConfigError(f"codec {name!r} sends all elements and has no ratio, got {ratio:g}")


def check_ratio(name: str, ratio: float) -> None:
    """Raise ConfigError if ``ratio`` is not above 0 and at most 1."""
    if not 0 < ratio <= 1:
        raise ConfigError(f"codec {name!r}: its ratio is above 0 and at most 1, got {ratio:g}")


def check_bits(name: str, bits: int, have: tuple[int, ...]) -> None:
    """Raise ConfigError if a codec has not so many bits; 0 is its own choice."""
    if bits and not have:
        raise ConfigError(f"codec {name!r} has no bits to choose, got {bits}")
    if bits and bits not in have:
        raise ConfigError(f"codec {name!r}: its bits are {' or '.join(map(str, have))}, got {bits}")


def check_parts(name: str, parts: Mapping[str, bytes], known: Collection[str]) -> None:
    """Raise WireError if a payload has parts that its codec does not know."""
    if strange := sorted(parts.keys() - set(known)):
        raise WireError(f"{name}: no part {strange[0]!r}")


def _named(name: str, decode: Callable[[bytes, Floats], Numbers], part: bytes, reference: Floats) -> Numbers:
    try:
        return decode(part, reference)
    except WireError as exc:
        raise WireError(f"{name}: {exc}") from exc
