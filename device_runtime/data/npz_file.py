"""The arrays of an NPZ file: what they are is looked at before any is unpacked, as a few bytes may stand for gigabytes."""

import math
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.errors import DataError, one_line, some

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_END = ".npy"
_NAMED = 8
UNPACKED_TIMES, UNPACKED_MIN = 512, 64 * 1024**2
"""Arrays take at most so many times the size of their file, or so many bytes; rows that are mostly padding come near it."""


def read_npz(path: Path, *, problems: Callable[[Arrays], Iterable[str]], skip: str = "") -> Arrays:
    """Read arrays by name, but for the one named ``skip``.

    Args:
        path: the file.
        problems: what is wrong with arrays of which only dtypes and shapes are to be believed: these take no memory, and
            nothing is unpacked unless they are right.
        skip: an array that is not wanted.

    Raises:
        DataError: no NPZ file, ``problems`` (all listed), or more than half of this machine's memory.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = [name for name in _names(path, archive) if name != skip]
            forms = {name: _form(path, archive, name) for name in names}
            if found := [*problems(forms), *_size_problems(forms, path.stat().st_size)]:
                raise DataError(f"{path}: " + "; ".join(found))
            return {name: _read(archive, name) for name in names}
    except DataError:
        raise
    except zipfile.BadZipFile as exc:
        raise DataError(f"{path}: {_what_else(path) or f'cannot be read as NPZ: {exc}'}") from exc
    except Exception as exc:  # zipfile, zlib and numpy raise a dozen types for a damaged file
        raise DataError(f"{path}: cannot be read as NPZ: {getattr(exc, 'strerror', None) or exc}") from exc


def listed(names: Iterable[str]) -> str:
    """Join names that a stranger may have given; of many, some."""
    return some([one_line(name, length_max=40) for name in sorted(names)], at_most=_NAMED)


def memory_problem(wanted: int) -> str:
    """Say that arrays of ``wanted`` bytes are too much for this machine; empty if they are not."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted <= have // 2:
        return ""
    return f"its arrays take {wanted >> 20} MB, more than half of this machine's memory ({have >> 20} MB)"


def _names(path: Path, archive: zipfile.ZipFile) -> list[str]:
    members = list(dict.fromkeys(archive.namelist()))
    if strange := [name for name in members if not name.endswith(_END)]:
        raise DataError(f"{path}: {listed(strange)}: no array")
    return [name.removesuffix(_END) for name in members]


def _form(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    """An array of a member's dtype and shape that takes no memory."""
    with archive.open(name + _END) as file:
        if file.read(len(npy.MAGIC_PREFIX)) != npy.MAGIC_PREFIX:
            raise DataError(f"{path}: {listed([name])}: no array")
    with archive.open(name + _END) as file:
        shape, _, dtype = _HEADERS[npy.read_magic(file)](file)
    if dtype.hasobject:
        raise DataError(
            f"{path}: {listed([name])}: an array of Python objects; give it a dtype, as np.asarray(rows, np.int64)"
        )
    return np.broadcast_to(np.empty((), dtype), shape)


def _size_problems(forms: Arrays, size_bytes: int) -> Iterable[str]:
    wanted = sum(math.prod(form.shape) * form.itemsize for form in forms.values())
    if problem := memory_problem(wanted):
        yield problem
    elif wanted > max(UNPACKED_MIN, UNPACKED_TIMES * size_bytes):
        yield f"its arrays take {wanted >> 20} MB, {UNPACKED_TIMES} times the file and more; if they are meant to, use np.savez"


def _read(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name + _END) as file:
        array: Array = npy.read_array(file, allow_pickle=False)
    return array


def _what_else(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(len(npy.MAGIC_PREFIX))
    return "one array without a name, not NPZ; np.savez names arrays" if start == npy.MAGIC_PREFIX else ""
