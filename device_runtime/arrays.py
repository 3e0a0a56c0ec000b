"""Named tensor sets: in memory, and in safetensors files written whole or not at all."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fleetune.device_runtime.errors import ArtifactError, one_line

Array = NDArray[np.generic]
Arrays = dict[str, Array]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
_DTYPES = {
    "BOOL": "?", "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
_BFLOAT16 = "BF16"
PRIVATE = 0o600
"""Mode of a file for its owner alone."""


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write ``content`` so that after a crash the file is the old one or the new one, whole; one process at a time.

    ``mode`` is the file's, less the umask; with ``PRIVATE`` nobody else can read it at any moment.
    """
    replace_file(path, [content], mode=mode)
    sync(path.parent)


def replace_file(path: Path, content: Iterable[bytes], *, mode: int = 0o666, is_synced: bool = True) -> None:
    """Put a file in the place of an old one; its folder is yet to :func:`sync`, and it too unless ``is_synced``."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # left by a kill, it has the mode that it was made with
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.writelines(content)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise OSError(exc.errno, exc.strerror or str(exc), str(path)) from exc


def sync(path: Path) -> None:
    """Have the content of a file on disk, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays of one dtype have the same shape and bits: -0.0 is not 0.0, and a NaN is itself."""
    words = np.dtype(f"u{one.dtype.itemsize}")
    return one.dtype == other.dtype and np.array_equal(one.view(words), other.view(words))


def to_bytes(arrays: Mapping[str, Array], *, metadata: dict[str, str] | None = None) -> bytes:
    """Arrays as the bytes of a safetensors file; equal arrays give equal bytes."""
    return save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}, metadata=metadata)


def save_arrays(
    path: Path,
    arrays: Mapping[str, Array],
    *,
    metadata: dict[str, str] | None = None,
    mode: int = 0o666,
) -> None:
    """Write a safetensors file atomically; ``mode`` as of :func:`write_atomically`."""
    write_atomically(path, to_bytes(arrays, metadata=metadata), mode=mode)


def load_arrays(path: Path) -> Arrays:
    """Read a safetensors file into memory, as :func:`parse_arrays`.

    Raises:
        ArtifactError: missing, truncated, not a safetensors file, or of a dtype that is not read.
    """
    try:
        return parse_arrays(path.read_bytes())
    except OSError as exc:
        raise ArtifactError(f"{path}: cannot be read as safetensors: {exc.strerror or exc}") from exc
    except ArtifactError as exc:
        raise ArtifactError(f"{path}: cannot be read as safetensors: {exc}") from exc


def parse_arrays(content: bytes) -> Arrays:
    """Arrays of the bytes of a safetensors file by name, in the file's order, writable; bfloat16 as float32 of the same values.

    Raises:
        ArtifactError: not a safetensors file, or a tensor of a dtype that is not read (all listed).
    """
    try:
        rows: dict[str, dict[str, Any]] = dict(deserialize(content))  # type: ignore[no-untyped-call]
        names = _file_order(content)
    except (SafetensorError, msgspec.MsgspecError, ValueError, OverflowError) as exc:
        raise ArtifactError(f"not a safetensors file: {one_line(exc)}") from exc
    foreign = [f"{n} is {row['dtype']}" for n, row in sorted(rows.items()) if not _is_read(row["dtype"])]
    if foreign:
        raise ArtifactError(f"{'; '.join(foreign)}; read are {', '.join([*_DTYPES, _BFLOAT16])}")
    try:
        return {name: _array(rows[name]) for name in names}
    except (ValueError, OverflowError) as exc:
        raise ArtifactError(f"a shape that no array can have: {exc}") from exc


def _file_order(content: bytes) -> list[str]:
    """Names as their data lie; ``deserialize``, which has checked the header, gives them in any order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = msgspec.json.decode(content[8:end])
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def _is_read(dtype: str) -> bool:
    return dtype in _DTYPES or dtype == _BFLOAT16


def _array(row: dict[str, Any]) -> Array:
    if row["dtype"] == _BFLOAT16:
        upper = np.frombuffer(row["data"], "<u2").astype(np.uint32) << 16
        return upper.view(np.float32).reshape(row["shape"])
    flat: Array = np.frombuffer(row["data"], _DTYPES[row["dtype"]])
    return flat.reshape(row["shape"])


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
