"""Arrays as they are: NPZ files that hold the model's inputs by name, and ``labels``."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.manifest import Input, Manifest
from fleetune.device_runtime.data.samples import IGNORED, Column, Dataset, Dense, make_dataset
from fleetune.device_runtime.errors import DataError

_PER_TOKEN = ("causal-lm", "token-classification")
"""Tasks with a label at every position, some of them IGNORED."""


def load_npz(path: Path, manifest: Manifest, *, seq_len: int, labelled: bool) -> Dataset:
    """Read arrays of exactly the names, shapes and dtypes of the manifest; integer labels of any width.

    Raises:
        DataError: no NPZ file, or names, shapes, dtypes or labels that do not fit (all listed).
    """
    arrays = _read_npz(path)
    wanted, label_name = manifest.features, manifest.label_name
    if not labelled:
        arrays.pop(label_name, None)
    names = {row.name for row in wanted} | ({label_name} if labelled else set())
    problems = [*_name_problems(arrays, names)] or [*_array_problems(arrays, wanted)]
    if labelled and not problems:
        problems = [*_label_problems(arrays, wanted[0], manifest)]
    if problems:
        raise DataError(f"{path}: " + "; ".join(problems))
    columns: dict[str, Column] = {row.name: Dense(arrays[row.name]) for row in wanted}
    if labelled:
        columns[label_name] = Dense(arrays[label_name].astype(np.int64))
    lengths = np.ones(len(arrays[wanted[0].name]), np.int64)
    return make_dataset(
        columns,
        lengths,
        seq_len=seq_len,
        num_classes=len(manifest.labels),
        label_name=label_name if labelled else "",
    )


def _read_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise DataError(f"{path}: cannot be read as NPZ: {getattr(exc, 'strerror', None) or exc}") from exc


def _name_problems(arrays: Arrays, wanted: set[str]) -> Iterator[str]:
    yield from (f"{name}: missing" for name in sorted(wanted - arrays.keys()))
    yield from (f"{name}: not an input of the model" for name in sorted(arrays.keys() - wanted))


def _array_problems(arrays: Arrays, wanted: Sequence[Input]) -> Iterator[str]:
    sizes: dict[str, int] = {}
    for row in wanted:
        array = arrays[row.name]
        if not row.fits(array, sizes):
            yield f"{row.name}: expected {row}, got {array.dtype}{list(array.shape)}"
        elif not len(array):
            yield f"{row.name}: no sample"
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            yield f"{row.name}: NaN or infinity in it"


def _label_problems(arrays: Arrays, first: Input, manifest: Manifest) -> Iterator[str]:
    labels, per_token = arrays[manifest.label_name], manifest.task in _PER_TOKEN
    want = arrays[first.name].shape[: 2 if per_token else 1]
    if labels.dtype.kind not in "iu" or labels.shape != want:
        yield f"{manifest.label_name}: expected integers {list(want)}, got {labels.dtype}{list(labels.shape)}"
        return
    classes = labels.astype(np.int64)
    judged = classes[classes != IGNORED] if per_token else classes
    top = np.iinfo(np.int64).max if manifest.task == "causal-lm" else len(manifest.labels) - 1
    wrong = judged[(judged < 0) | (judged > top)]
    if wrong.size:
        yield f"{manifest.label_name}: {wrong.size} out of range, the first is {wrong[0]}; expected 0 to {top}"
