"""A checkpoint in half precision as one in float32: what transformers maps of a file, where it would convert it in memory.

The values are the same: every number of 16 bits is one of 32. Read and written a piece at a time.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fleetune.device_runtime.arrays import Array
from fleetune.toolkit.sources import CONFIG

_WEIGHTS = "*.safetensors"
_HALF = ("BF16", "F16")
_KEPT = ("F32", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")
_AT_ONCE_BYTES = 2**24


@contextmanager
def widened(source: str, *, aside: Path | None) -> Iterator[str]:
    """A folder with the model of ``source`` in float32, or ``source`` itself if it is in float32, or not for us to convert.

    That is what is no folder, has no safetensors, or holds numbers that its configuration says how to read (quantised ones).

    Args:
        source: as the user named it.
        aside: a folder on the disk to write to; what is written there is gone afterwards, but for who has mapped it. None to
            write nothing.
    """
    files = sorted(Path(source).glob(_WEIGHTS))
    heads = {path: _head_of(path) for path in files} if aside else {}
    dtypes = {row["dtype"] for head in heads.values() for name, row in head.items() if name != "__metadata__"}
    if aside is None or not dtypes & {*_HALF} or dtypes - {*_HALF, *_KEPT} or _is_quantised(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix=".widened-", dir=aside) as folder:
        for path in Path(source).iterdir():
            if path in heads:
                _widen(path, Path(folder) / path.name, heads[path])
            else:
                (Path(folder) / path.name).symlink_to(path.resolve())
        yield folder


def _head_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; an empty one of what is none, of which transformers says what is wrong with it."""
    try:
        with safe_open(path, "np"), path.open("rb") as file:
            found: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return found
    except SafetensorError:
        return {}


def _is_quantised(source: str) -> bool:
    return "quantization_config" in json.loads((Path(source) / CONFIG).read_text())


def _widen(path: Path, out: Path, head: Mapping[str, Any]) -> None:
    rows: dict[str, Any] = {}
    begin = 0
    ordered = sorted((n for n in head if n != "__metadata__"), key=lambda n: head[n]["data_offsets"])
    for name in ordered:
        start, end = head[name]["data_offsets"]
        is_half = head[name]["dtype"] in _HALF
        size = (end - start) * (2 if is_half else 1)
        dtype = "F32" if is_half else head[name]["dtype"]
        rows[name] = {**head[name], "dtype": dtype, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps({"__metadata__": head.get("__metadata__", {"format": "pt"}), **rows}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("rb") as file, out.open("wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        data = 8 + int.from_bytes(file.read(8), "little")
        for name in ordered:
            start, end = head[name]["data_offsets"]
            file.seek(data + start)
            for piece in _pieces(file, end - start):
                written.write(_wide(piece, head[name]["dtype"]).data)


def _pieces(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    for at in range(0, num_bytes, _AT_ONCE_BYTES):
        yield file.read(min(_AT_ONCE_BYTES, num_bytes - at))


def _wide(piece: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return np.frombuffer(piece, "<u2").astype("<u4") << 16
    return np.frombuffer(piece, "<f2").astype("<f4") if dtype == "F16" else np.frombuffer(piece, np.uint8)
