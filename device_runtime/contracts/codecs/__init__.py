"""How tensors are packed: a codec is pure functions over a set of tensors, a payload is msgpack around its parts.

The receiver holds the reference (the adapter that the values start from), so a codec may send a difference.
Equal values give equal bytes. Adding a codec is its functions, one line in ``CODECS``, one line in the laws test
and one in docs/protocol.md.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.codecs.caesar import by_sign, by_stale, caesar
from fleetune.device_runtime.contracts.codecs.casts import fp16, fp32
from fleetune.device_runtime.contracts.codecs.codec import (
    Codec,
    Decoded,
    Doubles,
    Memory,
    Numbers,
    Shapes,
    by_nearest,
    chain_of,
    check_bits,
    check_no_ratio,
    check_tensors,
    floats,
)
from fleetune.device_runtime.contracts.codecs.feedback import with_feedback
from fleetune.device_runtime.contracts.codecs.frame import (
    Frame,
    check_shapes,
    frame_bytes_max,
    is_repeat,
    read,
    read_head,
    sizes_by_kind,
    write,
)
from fleetune.device_runtime.contracts.codecs.innovation import innovation
from fleetune.device_runtime.contracts.codecs.int8 import int8
from fleetune.device_runtime.contracts.codecs.quant import quant
from fleetune.device_runtime.contracts.codecs.topk import topk
from fleetune.device_runtime.contracts.codecs.xor import xor
from fleetune.device_runtime.errors import OtherMemory, WireError, choices, one_line
from fleetune.device_runtime.tables import Table

__all__ = [
    "CODECS",
    "EXACT",
    "Codec",
    "Packed",
    "by_nearest",
    "chain_named",
    "chain_of",
    "decode_update",
    "encode_update",
    "is_repeat",
    "make_codec",
    "pack",
    "reference_of",
    "sizes_by_kind",
    "unpack",
    "update_bytes_max",
    "with_feedback",
]


class Packed(NamedTuple):
    """A payload, and what its sender knows of it."""

    payload: bytes
    conveyed: Mapping[str, Numbers]
    """To the bit what the receiver will have."""
    memory: Arrays
    """The sender's, for next time."""


def make_codec(name: str, ratio: float = 0.0, bits: int = 0) -> Codec:
    """Make the codec ``name``.

    Args:
        name: a name in ``CODECS``.
        ratio: share of the elements that travel, with ``caesar`` exactly; 0 for codecs that send all.
        bits: of a value that travels; 0 for the codec's own, or for codecs without a choice.

    Raises:
        UnknownName: no such codec.
        ConfigError: a ratio or bits that the codec does not have, or no ratio where it needs one.
    """
    return CODECS[name](ratio, bits)


def pack(
    codec: Codec,
    values: Mapping[str, Array],
    reference: Mapping[str, Array],
    *,
    memory: Memory | None = None,
    reference_sha256: str = "",
) -> Packed:
    """Pack tensors for a receiver that holds ``reference``.

    Args:
        codec: what to pack with.
        values: float32 tensors by name; any subset of the reference's.
        reference: float32 tensors by name.
        memory: what this function returned last time; none at first.
        reference_sha256: names the reference in the payload, where it is not the version named around it.

    Raises:
        WireError: a tensor, or its memory, unknown to the reference, of another shape or not finite (all listed).
    """
    check_tensors(values, reference)
    wanted = {name: floats(values[name]) for name in sorted(values)}
    held = {name: floats(value) for name, value in reference.items()}
    coded = codec.encode(wanted, held, memory or {})
    chain = chain_of(memory or {}) if codec.receiver else ""
    payload = write(Frame(codec.name, reference_sha256, coded.parts, codec.frame, chain), _shapes(wanted))
    return Packed(payload, coded.conveyed, coded.memory)


def unpack(
    codec: Codec, payload: bytes, reference: Mapping[str, Array], *, memory: Memory | None = None
) -> Decoded:
    """Unpack what :func:`pack` made.

    Args:
        codec: the codec agreed on.
        payload: what came.
        reference: float32 tensors by name, the same as the sender's.
        memory: what this function returned last time; none at first.

    Returns:
        Tensors by name, a subset of the reference's, all finite: float64, or float32 ones that are not to be written. And the
        memory for next time.

    Raises:
        OtherMemory: encoded with another memory than this.
        WireError: malformed, another version or codec, an unknown or repeated tensor, a wrong shape or size, NaN or
            infinity.
    """
    largest = update_bytes_max(codec, reference)
    if len(payload) > largest:
        raise WireError(f"update of {len(payload)} bytes; these tensors take at most {largest}")
    if (named := read_head(payload).codec) != codec.name:
        raise WireError(f"update in codec {one_line(named)!r}; expected {codec.name}")
    frame, shapes = read(payload, bytes_max=largest)
    if frame.version != codec.frame:
        raise WireError(f"update in frame {frame.version}; expected {codec.frame}")
    check_shapes(shapes, reference)
    held = {name: floats(reference[name]) for name in sorted(shapes)}
    with np.errstate(invalid="ignore", over="ignore"):  # told below, by the names of the tensors
        decoded = codec.decode(frame.parts, held, _meant(frame, codec, memory or {}))
    for name, value in decoded.values.items():
        if not np.isfinite(value).all():
            raise WireError(f"{name}: NaN or infinity")
    return decoded


def encode_update(
    codec: str,
    values: Mapping[str, Array],
    reference: Mapping[str, Array],
    *,
    ratio: float = 1.0,
    bits: int = 0,
) -> bytes:
    """Pack tensors without memory, by the name of the codec; errors as :func:`make_codec` and :func:`pack`."""
    return pack(make_codec(codec, ratio, bits), values, reference).payload


def decode_update(
    payload: bytes, reference: Mapping[str, Array], *, codec: str | None = None, bits: int = 0
) -> dict[str, Doubles]:
    """Unpack without memory what is in codec ``codec``, or in any for None; WireError as :func:`unpack`."""
    expected = [codec] if codec else sorted(CODECS)
    named = read_head(payload).codec
    if named not in expected:
        raise WireError(f"update in codec {one_line(named)!r}; expected {choices(expected)}")
    decoded = unpack(make_codec(named, 1.0, bits), payload, reference)
    return {name: np.asarray(value, np.float64) for name, value in decoded.values.items()}


def chain_named(payload: bytes) -> str:
    """Chain of the memory that a payload is encoded with; empty for none, WireError if malformed."""
    return read_head(payload).memory


def reference_of(payload: bytes) -> str:
    """SHA-256 of the adapter file that a payload names as its reference; empty if it names none, WireError if malformed."""
    return read_head(payload).reference


def update_bytes_max(codec: Codec, reference: Mapping[str, Array]) -> int:
    """Length that no payload of ``reference``'s tensors in ``codec`` exceeds: what to accept, at most."""
    shapes = _shapes(reference)
    return frame_bytes_max(shapes) + codec.size_bytes_max(shapes)


def _meant(frame: Frame, codec: Codec, memory: Memory) -> Memory:
    """The memory that a payload is encoded with, if it is the one at hand; WireError if not."""
    if not codec.receiver or frame.memory == chain_of(memory):
        return memory
    if frame.memory:
        raise OtherMemory(
            f"update encoded with memory {one_line(frame.memory)[:12]!r}, which is not the one kept here"
        )
    return {}


def _shapes(tensors: Mapping[str, Array]) -> Shapes:
    return {name: value.shape for name, value in tensors.items()}


EXACT = ("fp32", "xor")
"""Codecs that lose nothing."""
_Make = Callable[[float, int], Codec]


def _whole(codec: Codec) -> _Make:
    """A codec that sends every element, in one way: its ratio is 1, or is left open, and it has no bits."""

    def make(ratio: float, bits: int) -> Codec:
        check_no_ratio(codec.name, ratio)
        check_bits(codec.name, bits, ())
        return codec

    return make


CODECS: Table[_Make] = Table(
    "codec",
    {
        "fp32": _whole(fp32),
        "fp16": _whole(fp16),
        "int8": _whole(int8),
        "topk": topk,
        "quant": quant,
        "innovation": innovation,
        "xor": _whole(xor),
        "caesar": caesar("caesar", by_stale),
        "caesar-sign": caesar("caesar-sign", by_sign),
        "caesar-zero": caesar("caesar-zero", None),
    },
)
