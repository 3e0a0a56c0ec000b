"""Named tensor sets: in memory, and in safetensors files written whole or not at all."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fleetune.device_runtime.errors import ArtifactError

Array = NDArray[np.generic]
Arrays = dict[str, Array]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` so that after a crash the file is the old one or the new one, whole; one process at a time."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_bytes(arrays: Mapping[str, Array], *, metadata: dict[str, str] | None = None) -> bytes:
    """Arrays as the bytes of a safetensors file; equal arrays give equal bytes."""
    return save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}, metadata=metadata)


def save_arrays(path: Path, arrays: Mapping[str, Array], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    write_atomically(path, to_bytes(arrays, metadata=metadata))


def load_arrays(path: Path) -> Arrays:
    """Read a safetensors file into memory.

    Raises:
        ArtifactError: missing, truncated or not a safetensors file.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as exc:
        raise ArtifactError(f"{path}: cannot be read as safetensors: {exc}") from exc


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
