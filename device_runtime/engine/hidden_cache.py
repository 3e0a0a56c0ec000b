"""Keeps what flows into the lowest trained layer on disk: while the layers below stay frozen, an example passes them once.

Exact up to fp16, the type it is stored in. What is used is always what would be read back, so that a run is the same whether
an example was found or not, and however often it was interrupted.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Indices
from fleetune.device_runtime.errors import ConfigError

log = logging.getLogger(__name__)

Missing = NDArray[np.bool_]
_FILE = "hidden.f16"


class HiddenRows(Protocol):
    """The stored hidden streams of the rows of one batch."""

    def some(self, place: slice) -> "HiddenRows":
        """Those of a part of the batch."""
        ...

    def load(self, shape: tuple[int, ...]) -> tuple[Array, Missing]:
        """float32 of ``shape`` (batch, seq, width), and which rows are not there (zeros)."""
        ...

    def store(self, missing: Missing, hidden: Array) -> Array:
        """Keep ``hidden`` of the rows in ``missing``; returns it as it would be read back."""
        ...


OpenRows = Callable[[Mapping[str, Array]], HiddenRows]
"""(what lies below the lowest trained layer beside the base) -> the rows of one batch; as of :meth:`HiddenCache.of`."""


class _Place(NamedTuple):
    offset: int
    tokens: int


class HiddenCache:
    """One file of hidden streams of one data set, for one set of frozen layers at a time.

    A full cache keeps what it has: over epochs that visit each example once, that finds more than throwing out the oldest
    would. It is emptied when the layers below change. A disk without room ends the storing, not the training.
    """

    def __init__(self, folder: Path, *, lengths: Indices | None, limit_bytes: int) -> None:
        """Start empty in ``folder``; whatever an earlier run left there is thrown away.

        Args:
            folder: made if it is not there.
            lengths: tokens of each example without its padding; None where rows have one shape.
            limit_bytes: largest size of the file.

        Raises:
            ConfigError: the folder cannot be written.
        """
        self._lengths, self._limit = lengths, limit_bytes
        self._places: dict[int, _Place] = {}
        self._below: tuple[object, ...] = ()
        self._end = 0
        self._storing = True
        self._writing = Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.f16"):
                left.unlink()
            self._file = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError as exc:
            raise ConfigError(f"hidden cache in {folder}: {exc.strerror}") from exc
        self._path = folder / _FILE

    def __enter__(self) -> "HiddenCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file."""
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    @property
    def size_bytes(self) -> int:
        """What the file holds now."""
        return self._end

    def of(self, examples: Indices, below: Mapping[str, Array]) -> "_Rows":
        """The rows of a batch.

        Args:
            examples: index of each row's example in the data set.
            below: what the frozen layers are made of besides the base: adapter tensors by name, the layer plan as an array.
                Arrays are compared by identity first, then by content.
        """
        self._keep_only(below)
        return _Rows(self, examples)

    def read(self, example: int, out: Array) -> bool:
        """Fill the first tokens of ``out`` (seq, width) float32; False if the example is not there, or cut off the file."""
        place = self._places.get(example)
        if place is None:
            return False
        tokens = min(place.tokens, len(out))
        wanted = 2 * tokens * out.shape[1]
        content = os.pread(self._file, wanted, place.offset)
        if len(content) < wanted:
            return False
        out[:tokens] = np.frombuffer(content, np.float16).reshape(tokens, -1)
        return True

    def write(self, example: int, hidden: NDArray[np.float16]) -> None:
        """Keep ``hidden`` (seq, width) without its padding, if there is room; several threads may."""
        content = np.ascontiguousarray(hidden[: self._tokens(example, len(hidden))])
        with self._writing:
            if self._storing and self._end + content.nbytes <= self._limit:
                self._append(example, content)

    def _append(self, example: int, content: NDArray[np.float16]) -> None:
        try:
            written = os.pwrite(self._file, content.data, self._end)
        except OSError as exc:
            self._storing = False
            log.warning("hidden cache %s: %s; going on without storing more", self._path, exc.strerror)
            return
        if written == content.nbytes:
            self._places[example] = _Place(self._end, len(content))
            self._end += content.nbytes

    def _tokens(self, example: int, width: int) -> int:
        return width if self._lengths is None else min(width, int(self._lengths[example]))

    def _keep_only(self, below: Mapping[str, Array]) -> None:
        arrays = (*below, *below.values())
        same = len(arrays) == len(self._below) and all(map(_is_same, arrays, self._below))
        if not same:
            self._places.clear()
            self._end = 0
            self._storing = True
            os.ftruncate(self._file, 0)
        self._below = arrays


class _Rows:
    def __init__(self, cache: HiddenCache, examples: Indices) -> None:
        self._cache, self._examples = cache, examples

    def some(self, place: slice) -> "_Rows":
        return _Rows(self._cache, self._examples[place])

    def load(self, shape: tuple[int, ...]) -> tuple[Array, Missing]:
        hidden = np.zeros(shape, np.float32)
        found = [self._cache.read(int(e), row) for e, row in zip(self._examples, hidden, strict=True)]
        return hidden, ~np.array(found, bool)

    def store(self, missing: Missing, hidden: Array) -> Array:
        with np.errstate(over="ignore"):
            halves = hidden.astype(np.float16)
        if not np.isfinite(halves).all():
            raise ConfigError(
                f"hidden cache: the hidden stream reaches {np.abs(hidden).max():.3g}, beyond fp16; train without it"
            )
        for example, row in zip(self._examples[missing], halves, strict=True):
            self._cache.write(int(example), row)
        return halves.astype(np.float32)


def _is_same(new: object, old: object) -> bool:
    if isinstance(new, np.ndarray) and isinstance(old, np.ndarray):
        return new is old or np.array_equal(new, old)
    return new == old
