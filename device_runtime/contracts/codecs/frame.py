"""The bytes around the parts of a codec: msgpack, with the name and shape of every tensor."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.contracts.codecs.codec import Shapes
from fleetune.device_runtime.errors import WireError, one_line

VERSION = 1
_HEAD_BYTES = 256
_TENSOR_BYTES = 96


class Frame(NamedTuple):
    """What a payload says of itself."""

    codec: str
    reference: str
    """SHA-256 of the adapter file that it is encoded against; empty for that of the version named around it."""
    parts: dict[str, bytes]


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    data: bytes


class _Update(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    codec: str
    tensors: list[_Tensor]
    reference: str = ""


_decoder = msgspec.msgpack.Decoder(_Update)


def write(frame: Frame, shapes: Shapes) -> bytes:
    """Frame to bytes; equal frames give equal bytes, whatever the order of their parts."""
    tensors = [_Tensor(name, shapes[name], frame.parts[name]) for name in sorted(frame.parts)]
    return msgspec.msgpack.encode(_Update(VERSION, frame.codec, tensors, frame.reference))


def read(payload: bytes) -> tuple[Frame, Shapes]:
    """Bytes to a frame and the shapes in it.

    Raises:
        WireError: malformed, of another version, or a tensor comes twice.
    """
    try:
        update = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise WireError(f"malformed update: {one_line(exc)}") from exc
    if update.v != VERSION:
        raise WireError(f"update of version {update.v}; this side reads {VERSION}")
    parts = {tensor.name: tensor.data for tensor in update.tensors}
    if len(parts) < len(update.tensors):
        raise WireError("update does not fit: a tensor comes twice")
    return Frame(update.codec, update.reference, parts), {t.name: t.shape for t in update.tensors}


def check_shapes(shapes: Shapes, reference: Mapping[str, Array]) -> None:
    """Raise WireError that lists the tensors unknown to the reference or of another shape."""
    problems = []
    for name, shape in shapes.items():
        if name not in reference:
            problems.append(f"{one_line(name)!r}: unknown tensor")
        elif shape != reference[name].shape:
            problems.append(f"{name}: shape {list(shape)[:8]}, expected {list(reference[name].shape)}")
    if problems:
        raise WireError("update does not fit: " + "; ".join(problems[:8]))


def frame_bytes_max(shapes: Shapes) -> int:
    """Length that a frame around these tensors' parts never exceeds, without the parts."""
    return _HEAD_BYTES + sum(_TENSOR_BYTES + len(name.encode()) + 9 * len(s) for name, s in shapes.items())
