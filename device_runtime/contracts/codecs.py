"""How an update is packed: a codec is pure functions over one tensor, an update is msgpack over many.

The receiver holds the reference (the adapter version that the update starts from), so a codec may send a
difference. Equal values give equal bytes. Adding a codec is its functions, one line in ``CODECS`` and one
line in the laws test.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Arrays, Floats
from fleetune.device_runtime.errors import WireError, choices, one_line
from fleetune.device_runtime.tables import Table

VERSION = 1
BLOCK = 256
"""Elements that share one scale in ``int8``."""

Doubles = NDArray[np.float64]
_FRAME_BYTES = 96


class Codec(NamedTuple):
    """One way to send a tensor; both sides use the same reference, of the same shape."""

    encode: Callable[[Floats, Floats], bytes]
    """(value, reference), float32, finite -> payload."""
    decode: Callable[[bytes, Floats], Doubles]
    """(payload, reference) -> value, float64, of the reference's shape; WireError if it cannot be."""
    size_bytes: Callable[[int], int]
    """Number of elements -> exact length of the payload."""


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    data: bytes


class _Update(msgspec.Struct, frozen=True):
    v: int
    codec: str
    tensors: list[_Tensor]


_decoder = msgspec.msgpack.Decoder(_Update)


def encode_update(codec: str, values: Mapping[str, Array], reference: Mapping[str, Array]) -> bytes:
    """Pack tensors for a receiver that holds ``reference``.

    Args:
        codec: a name in ``CODECS``.
        values: float32 tensors by name; any subset of the reference's.
        reference: float32 tensors by name.

    Raises:
        UnknownName: no such codec.
        WireError: a tensor unknown to the reference, of another shape, or not finite (all listed).
    """
    encode = CODECS[codec].encode
    _check(values, reference)
    tensors = []
    for name in sorted(values):
        value, held = _floats(values[name]), _floats(reference[name])
        tensors.append(_Tensor(name, value.shape, encode(value, held)))
    return msgspec.msgpack.encode(_Update(VERSION, codec, tensors))


def encode_with_feedback(
    codec: str, values: Mapping[str, Array], reference: Mapping[str, Array], residual: Mapping[str, Array]
) -> tuple[bytes, Arrays]:
    """Pack tensors, adding what earlier updates could not convey.

    Args:
        codec: a name in ``CODECS``.
        values: float32 tensors by name; any subset of the reference's.
        reference: float32 tensors by name.
        residual: what this function returned last time; empty at first.

    Returns:
        The payload, and the residual for next time: float64, only tensors in which something is left.
        Conveyed difference plus new residual is the difference plus the old residual.

    Raises:
        UnknownName: no such codec.
        WireError: as :func:`encode_update`, or a residual of another shape.

    Source: Karimireddy et al., Error Feedback Fixes SignSGD, arXiv 1901.09847.
    """
    _check(values, reference)
    _check(residual, reference)
    owed = {name: _owed(value, residual.get(name)) for name, value in values.items()}
    payload = encode_update(codec, {name: _floats(value) for name, value in owed.items()}, reference)
    conveyed = decode_update(payload, reference)
    left = {name: np.asarray(owed[name] - conveyed[name]) for name in owed}
    untouched = {name: value for name, value in residual.items() if name not in values}
    return payload, {**untouched, **{name: value for name, value in left.items() if value.any()}}


def decode_update(
    payload: bytes, reference: Mapping[str, Array], *, codec: str | None = None
) -> dict[str, Doubles]:
    """Unpack an update.

    Args:
        payload: what :func:`encode_update` made.
        reference: float32 tensors by name, the same as the sender's.
        codec: the codec agreed on; None takes any.

    Returns:
        Float64 tensors by name, a subset of the reference's, all finite.

    Raises:
        WireError: malformed, another version or codec, an unknown or repeated tensor, a wrong shape or
            size, NaN or infinity.
    """
    _check_size(payload, reference, codec)
    try:
        update = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise WireError(f"malformed update: {one_line(exc)}") from exc
    if update.v != VERSION:
        raise WireError(f"update of version {update.v}; this side reads {VERSION}")
    if update.codec not in CODECS or codec not in (None, update.codec):
        raise WireError(f"update in codec {one_line(update.codec)!r}; expected {codec or choices(CODECS)}")
    problems = [problem for tensor in update.tensors for problem in _problems(tensor, reference)]
    if len({tensor.name for tensor in update.tensors}) < len(update.tensors):
        problems.append("a tensor comes twice")
    if problems:
        raise WireError("update does not fit: " + "; ".join(problems[:8]))
    return {tensor.name: _decoded(tensor, update.codec, reference) for tensor in update.tensors}


def update_bytes_max(codec: str, reference: Mapping[str, Array]) -> int:
    """Length that no update of ``reference``'s tensors in ``codec`` exceeds: what to accept, at most.

    Raises:
        UnknownName: no such codec.
    """
    size_bytes = CODECS[codec].size_bytes
    framed = sum(
        _FRAME_BYTES + len(name.encode()) + size_bytes(value.size) for name, value in reference.items()
    )
    return _FRAME_BYTES + framed


def _floats(value: Array) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(value, dtype="<f4")


def _owed(value: Array, residual: Array | None) -> Doubles:
    wide = np.asarray(value, np.float64)
    # Adding a zero residual would turn -0.0 into 0.0, and fp32 conveys every bit.
    return wide if residual is None else np.asarray(wide + np.asarray(residual, np.float64))


def _check(values: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
    problems = [f"{name}: not in the reference" for name in sorted(values.keys() - reference.keys())]
    for name in sorted(values.keys() & reference.keys()):
        value, held = values[name], reference[name]
        if value.shape != held.shape:
            problems.append(f"{name}: shape {list(value.shape)}, the reference has {list(held.shape)}")
        elif not (np.isfinite(value).all() and np.isfinite(held).all()):
            problems.append(f"{name}: not finite")
    if problems:
        raise WireError("cannot pack: " + "; ".join(problems))


def _check_size(payload: bytes, reference: Mapping[str, Array], codec: str | None) -> None:
    expected = [name for name in CODECS if codec in (None, name)]
    largest = max((update_bytes_max(name, reference) for name in expected), default=0)
    if len(payload) > largest:
        raise WireError(f"update of {len(payload)} bytes; these tensors take at most {largest}")


def _problems(tensor: _Tensor, reference: Mapping[str, Array]) -> list[str]:
    held = reference.get(tensor.name)
    if held is None:
        return [f"{one_line(tensor.name)!r}: unknown tensor"]
    if tensor.shape != held.shape:
        return [f"{tensor.name}: shape {list(tensor.shape)[:8]}, expected {list(held.shape)}"]
    return []


def _decoded(tensor: _Tensor, codec: str, reference: Mapping[str, Array]) -> Doubles:
    held = _floats(reference[tensor.name])
    expected = CODECS[codec].size_bytes(held.size)
    if len(tensor.data) != expected:
        raise WireError(f"{tensor.name}: {len(tensor.data)} bytes of {codec}, expected {expected}")
    value = CODECS[codec].decode(tensor.data, held)
    if not np.isfinite(value).all():
        raise WireError(f"{tensor.name}: NaN or infinity")
    return value


def _fp32_encode(value: Floats, reference: Floats) -> bytes:
    return value.tobytes()


def _fp32_decode(payload: bytes, reference: Floats) -> Doubles:
    return _doubles(payload, "<f4", reference)


def _fp16_encode(value: Floats, reference: Floats) -> bytes:
    with np.errstate(over="ignore"):
        halves = _difference(value, reference).astype("<f2")
    if not np.isfinite(halves).all():
        raise WireError("cannot pack: a difference beyond 65504 does not fit fp16")
    return halves.tobytes()


def _fp16_decode(payload: bytes, reference: Floats) -> Doubles:
    return np.asarray(reference + _doubles(payload, "<f2", reference))


def _int8_encode(value: Floats, reference: Floats) -> bytes:
    difference = _difference(value, reference).reshape(-1)
    blocks = np.zeros((_num_blocks(difference.size), BLOCK))
    blocks.reshape(-1)[: difference.size] = difference
    peaks = np.abs(blocks).max(axis=1)  # (blocks,)
    # Rounded up, so that the peak itself never falls outside the 127 steps.
    scales = np.where(peaks > 0, np.nextafter((peaks / 127).astype("<f4"), np.float32(np.inf)), 0).astype(
        "<f4"
    )
    steps = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] > 0)
    quantised = np.rint(steps).astype(np.int8).reshape(-1)[: difference.size]
    return bytes(scales.tobytes() + quantised.tobytes())


def _int8_decode(payload: bytes, reference: Floats) -> Doubles:
    num_blocks = _num_blocks(reference.size)
    scales = np.frombuffer(payload, "<f4", count=num_blocks).astype(np.float64)
    steps = np.frombuffer(payload, np.int8, offset=4 * num_blocks)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise WireError("int8: a scale is negative or not finite")
    difference = steps * np.repeat(scales, BLOCK)[: reference.size]
    return np.asarray(reference + difference.reshape(reference.shape))


def _int8_bytes(count: int) -> int:
    return 4 * _num_blocks(count) + count


def _difference(value: Floats, reference: Floats) -> Doubles:
    return np.asarray(np.float64(value) - np.float64(reference))


def _doubles(payload: bytes, dtype: str, reference: Floats) -> Doubles:
    numbers: NDArray[Any] = np.frombuffer(payload, dtype)
    return numbers.astype(np.float64).reshape(reference.shape)


def _num_blocks(count: int) -> int:
    return -(-count // BLOCK)


CODECS = Table(
    "codec",
    {
        "fp32": Codec(_fp32_encode, _fp32_decode, lambda count: 4 * count),
        "fp16": Codec(_fp16_encode, _fp16_decode, lambda count: 2 * count),
        "int8": Codec(_int8_encode, _int8_decode, _int8_bytes),
    },
)
