"""Folders by class: each folder inside is named as a class and holds its images or recordings."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Floats, Indices
from fleetune.device_runtime.contracts.artifact import PREPROCESSOR
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.data.images import image_reader
from fleetune.device_runtime.data.labels import class_reader
from fleetune.device_runtime.data.npz import dense_dataset
from fleetune.device_runtime.data.npz_file import memory_problem
from fleetune.device_runtime.data.recordings import recording_reader
from fleetune.device_runtime.data.rows import Source
from fleetune.device_runtime.data.samples import Cut, Dataset
from fleetune.device_runtime.errors import ArtifactError, DataError, one_line, some

Read = Callable[[Path], tuple[Floats, int]]
"""A file -> what the model takes of it, and the values of it that are cut off."""


_LEARNS = {"regression": "numbers", "multi_label_classification": "any of several labels"}


class _File(NamedTuple):
    path: Path
    label: int


def load_folder(
    path: Path, manifest: Manifest, folder: Path, *, seq_len: int, labelled: bool = True
) -> Dataset:
    """Read a folder of images or recordings, in the order of its classes' and files' names.

    Args:
        path: holds a folder for each class, which may be empty; hidden files are not looked at.
        manifest: names the model's input, float32, (batch, channels, height, width) or (batch, values), and the classes.
        folder: the artifact's, which says in ``preprocessor_config.json`` how a file becomes what the model takes.
        seq_len: kept in the data set's digest.
        labelled: False takes all files in it, in classes or not.

    Raises:
        DataError: no classes or one alone, a name that is no class, no file, or one that cannot be read; names it.
        ArtifactError: the artifact does not say how files are read.
        ConfigError: the library that reads them is not installed.
    """
    if labelled and manifest.problem_type:
        raise DataError(
            f"{path}: a folder by class says one class of a file, and this model learns {_LEARNS[manifest.problem_type]}; "
            "bring an .npz file"
        )
    files = [*_classed(path, manifest)] if labelled else [_File(file, 0) for file in files_in(path)]
    if not files:
        raise DataError(f"{path}: no file in the folder")
    read, shape = _reader(path, manifest, folder)
    if problem := memory_problem(len(files) * int(np.prod(shape)) * 4):
        raise DataError(f"{path}: {problem}")
    rows, lost = np.empty((len(files), *shape), np.float32), np.zeros(len(files), np.int64)
    for i, file in enumerate(files):
        rows[i], lost[i] = read(file.path)
    arrays: dict[str, Array] = {manifest.features[0].name: rows}
    if labelled:
        arrays[manifest.label_name] = np.array([file.label for file in files], np.int64)
    return dense_dataset(
        arrays, manifest, seq_len=seq_len, labelled=labelled, cut=_cut(path, lost, int(np.prod(shape)))
    )


def files_in(path: Path) -> list[Path]:
    """The files below a folder by name, those of hidden names aside."""
    found = (Path(at) / name for at, _, names in os.walk(path) for name in names)
    return sorted(
        file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def _classed(path: Path, manifest: Manifest) -> Iterator[_File]:
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        shown = f"one alone, {one_line(names[0])}" if names else "none"
        raise DataError(
            f"{path}: expected a folder for each class, found {shown}; have classes: {some(manifest.labels, at_most=10)} "
            "(a class without files may have an empty one)"
        )
    read = class_reader(manifest.labels)
    for number, name in enumerate(names, 1):
        label = read(name, Source(path, number, "folder"))
        yield from (_File(file, label) for file in files_in(path / name))


def _reader(path: Path, manifest: Manifest, folder: Path) -> tuple[Read, tuple[int, ...]]:
    features = manifest.features
    shape = tuple(size for size in features[0].shape[1:] if isinstance(size, int))
    make = _READERS.get(len(shape)) if len(shape) == len(features[0].shape) - 1 else None
    if make is None or len(features) > 1 or features[0].dtype != "float32":
        raise DataError(
            f"{path}: a folder; this model takes {', '.join(map(str, features))}, neither pixels "
            "(batch, channels, height, width) nor sound (batch, values): bring a file"
        )
    if PREPROCESSOR not in manifest.files:
        raise ArtifactError(
            f"{folder}: does not say how files are read; put the model's {PREPROCESSOR} beside it and export again, "
            "or bring an .npz file"
        )
    return make(folder / PREPROCESSOR, shape), shape


def _cut(path: Path, lost: Indices, length: int) -> Cut | None:
    if not lost.any():
        return None
    total = int(lost.sum()) + length * len(lost)
    return Cut(str(path), int((lost > 0).sum()), len(lost), int(lost.sum()), total, length, length, "values")


_READERS = {3: image_reader, 1: recording_reader}
"""By the dimensions of a sample."""
