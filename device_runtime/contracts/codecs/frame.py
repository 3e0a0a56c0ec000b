"""The bytes around the parts of a codec: msgpack, with the name and shape of every tensor.

Frame 1, of release 0.1.0, holds a part for each tensor. Frame 2 holds parts by kind, each of all tensors together in the order
of their names, entropy-coded where that is shorter.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, NamedTuple

import msgspec

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.contracts.codecs.codec import BY_KIND, BY_TENSOR, Shapes, count_of
from fleetune.device_runtime.contracts.codecs.deflate import HUFFMAN, RUNS, TEXT, deflated, inflated
from fleetune.device_runtime.contracts.codecs.int8 import scale_bytes
from fleetune.device_runtime.contracts.codecs.topk import place_bytes
from fleetune.device_runtime.contracts.codecs.xor import RANKS
from fleetune.device_runtime.errors import WireError, one_line
from fleetune.device_runtime.prepared import prepared

VALUES, POSITIONS, SCALES, PROTOCOL = KINDS = ("values", "positions", "scales", "protocol")
"""Kinds of bytes. A part of frame 2 is named for its kind, or ``KIND-WHAT``."""
_HEAD_BYTES = 512
_TENSOR_BYTES = 96
_PARTS_MAX = 16
_STRATEGIES = {"table": TEXT, **dict.fromkeys(RANKS, RUNS)}
"""How parts are entropy-coded that repeat themselves."""


class Frame(NamedTuple):
    """What a payload says of itself."""

    codec: str
    reference: str
    """SHA-256 of the adapter file that it is encoded against; empty for that of the version named around it."""
    parts: dict[str, bytes]
    version: int = BY_TENSOR
    memory: str = ""
    """Chain of the memory that it is encoded with; empty without."""


class Head(msgspec.Struct, frozen=True):
    """What a payload says before its parts, as :class:`Frame`."""

    v: int
    codec: str
    reference: str = ""
    memory: str = ""


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    data: bytes


class _Update(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    codec: str
    tensors: list[_Tensor]
    reference: str = ""


class _TensorView(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    data: memoryview
    """Where it lies in the payload: nothing is copied."""


class _UpdateView(msgspec.Struct, frozen=True):
    codec: str
    tensors: list[_TensorView]


class _Section(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=0)]
    data: bytes
    """Entropy-coded if it is shorter than ``size``."""


class _Lean(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    codec: str
    table: _Section
    parts: Annotated[dict[str, _Section], msgspec.Meta(max_length=_PARTS_MAX)]
    reference: str = ""
    memory: str = ""


_Rows = list[tuple[str, tuple[int, ...]]]
_head, _by_tensor = msgspec.msgpack.Decoder(prepared(Head)), msgspec.msgpack.Decoder(prepared(_Update))
_sizes_of = msgspec.msgpack.Decoder(prepared(_UpdateView))
_by_kind, _rows = msgspec.msgpack.Decoder(prepared(_Lean)), msgspec.msgpack.Decoder(prepared(_Rows))
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def write(frame: Frame, shapes: Shapes) -> bytes:
    """Frame to bytes; equal frames give equal bytes, whatever the order of their parts."""
    if frame.version == BY_TENSOR:
        tensors = [_Tensor(name, shapes[name], frame.parts[name]) for name in sorted(frame.parts)]
        return msgspec.msgpack.encode(_Update(BY_TENSOR, frame.codec, tensors, frame.reference))
    table = msgspec.msgpack.encode([(name, shapes[name]) for name in sorted(shapes)])
    parts = {kind: _section(kind, frame.parts[kind]) for kind in sorted(frame.parts) if frame.parts[kind]}
    return msgspec.msgpack.encode(
        _Lean(BY_KIND, frame.codec, _section("table", table), parts, frame.reference, frame.memory)
    )


def read(payload: bytes, *, bytes_max: int) -> tuple[Frame, Shapes]:
    """Bytes to a frame and the shapes in it.

    Args:
        payload: what came.
        bytes_max: what neither its table of tensors nor its parts together may exceed once inflated.

    Raises:
        WireError: malformed, of another version, or a tensor comes twice.
    """
    head = read_head(payload)
    try:
        return _FRAMES[head.v](payload, bytes_max)
    except _MALFORMED as exc:
        raise WireError(f"malformed update: {one_line(exc)}") from exc


def read_head(payload: bytes) -> Head:
    """What a payload says before its parts; WireError if it is malformed, or of a version that this side does not read."""
    try:
        head = _head.decode(payload)
    except _MALFORMED as exc:
        raise WireError(f"malformed update: {one_line(exc)}") from exc
    if head.v not in _FRAMES:
        raise WireError(f"update of version {head.v}; this side reads {BY_TENSOR} and {BY_KIND}")
    return head


def is_repeat(payload: bytes) -> bool:
    """Whether a payload names tensors and a memory, and holds nothing of them; WireError if malformed."""
    if read_head(payload).v != BY_KIND:
        return False
    try:
        update = _by_kind.decode(payload)
    except _MALFORMED as exc:
        raise WireError(f"malformed update: {one_line(exc)}") from exc
    return bool(update.memory and not update.parts and update.table.size > 1)


def sizes_by_kind(payload: bytes) -> dict[str, int]:
    """Bytes of a payload by kind, as they travel: values, positions, scales, and the rest as protocol; WireError if malformed."""
    head = read_head(payload)
    try:
        found = dict.fromkeys(KINDS, 0)
        for kind, size in _SIZES[head.v](payload):
            found[kind] += size
    except _MALFORMED as exc:
        raise WireError(f"malformed update: {one_line(exc)}") from exc
    found[PROTOCOL] = len(payload) - sum(found[kind] for kind in KINDS if kind != PROTOCOL)
    return found


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


def _read_by_tensor(payload: bytes, bytes_max: int) -> tuple[Frame, Shapes]:
    update = _by_tensor.decode(payload)
    parts = {tensor.name: tensor.data for tensor in update.tensors}
    if len(parts) < len(update.tensors):
        raise WireError("update does not fit: a tensor comes twice")
    return Frame(update.codec, update.reference, parts), {t.name: t.shape for t in update.tensors}


def _read_by_kind(payload: bytes, bytes_max: int) -> tuple[Frame, Shapes]:
    update = _by_kind.decode(payload)
    sizes = {"table": update.table.size, **{kind: s.size for kind, s in update.parts.items()}}
    if sum(sizes.values()) > bytes_max:
        raise WireError(
            f"update inflates to {sum(sizes.values())} bytes; these tensors take at most {bytes_max}"
        )
    if strange := [kind for kind in update.parts if _kind_of(kind) not in KINDS]:
        raise WireError(f"update does not fit: no part {one_line(strange[0])!r}")
    rows = _rows.decode(_opened("table", update.table))
    names = [name for name, _ in rows]
    if any(left >= right for left, right in pairwise(names)):
        raise WireError("update does not fit: a tensor comes twice, or out of order")
    parts = {kind: _opened(kind, section) for kind, section in update.parts.items()}
    return Frame(update.codec, update.reference, parts, BY_KIND, update.memory), dict(rows)


def _kind_of(part: str) -> str:
    """Kind of a part of frame 2."""
    return part.split("-", 1)[0]


def _section(kind: str, content: bytes) -> _Section:
    return _Section(len(content), deflated(content, _STRATEGIES.get(kind, HUFFMAN)))


def _opened(kind: str, section: _Section) -> bytes:
    if len(section.data) == section.size:
        return section.data
    return inflated(section.data, section.size, what=kind)


def _sizes_by_tensor(payload: bytes) -> list[tuple[str, int]]:
    update, found = _sizes_of.decode(payload), []
    for tensor in update.tensors:
        beside = _BESIDE.get(update.codec)
        kind, size = beside(tensor.data, count_of(tensor.shape)) if beside else (SCALES, 0)
        size = min(size, len(tensor.data))
        found += [(kind, size), (VALUES, len(tensor.data) - size)]
    return found


def _sizes_by_kind(payload: bytes) -> list[tuple[str, int]]:
    parts = _by_kind.decode(payload).parts
    return [(_kind_of(kind), len(section.data)) for kind, section in parts.items() if _kind_of(kind) in KINDS]


_FRAMES = {BY_TENSOR: _read_by_tensor, BY_KIND: _read_by_kind}
_SIZES = {BY_TENSOR: _sizes_by_tensor, BY_KIND: _sizes_by_kind}
_BESIDE = {
    "int8": lambda data, count: (SCALES, scale_bytes(count)),
    "topk": lambda data, count: (POSITIONS, place_bytes(data, count)),
}
"""What a part of frame 1 holds beside values."""
