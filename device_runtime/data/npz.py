"""Arrays as they are: NPZ files that hold the model's inputs by name, and ``labels``."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.manifest import Input, Manifest
from fleetune.device_runtime.data.samples import IGNORED, Column, Dataset, Dense, make_dataset
from fleetune.device_runtime.errors import DataError, choices

_PER_TOKEN = ("causal-lm", "token-classification")
"""Tasks with a label at every position, some of them IGNORED."""


_MASK = "attention_mask"
_SEQ = "seq"


def load_npz(
    path: Path, manifest: Manifest, *, seq_len: int, length_max: int = 0, labelled: bool = True
) -> Dataset:
    """Read arrays of exactly the names, shapes and dtypes of the manifest; integer labels of any width are class indices.

    Args:
        path: the file.
        manifest: names the inputs.
        seq_len: kept in the data set's digest; rows are not cut.
        length_max: the most tokens that the model takes; 0 where that is not known.
        labelled: False reads the inputs alone.

    Raises:
        DataError: no NPZ file, or names, shapes, dtypes, ids or labels that do not fit (all listed).
    """
    arrays = _read_npz(path)
    wanted, label_name = manifest.features, manifest.label_name
    if not labelled:
        arrays.pop(label_name, None)
    names = {row.name for row in wanted} | ({label_name} if labelled else set())
    problems = [*_name_problems(arrays, names)] or [*_array_problems(arrays, wanted, length_max)]
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
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: one array without a name, not NPZ; np.savez names arrays")
        with archive:
            found = dict(archive)
    except DataError:
        raise
    except MemoryError as exc:
        raise DataError(f"{path}: arrays of a size that this machine's memory does not hold: {exc}") from exc
    except Exception as exc:  # zipfile, zlib and numpy raise a dozen types for a damaged file
        raise DataError(f"{path}: cannot be read as NPZ: {getattr(exc, 'strerror', None) or exc}") from exc
    if strange := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
        raise DataError(f"{path}: {choices(strange)}: no array")
    return found


def _name_problems(arrays: Arrays, wanted: set[str]) -> Iterator[str]:
    yield from (f"{name}: missing" for name in sorted(wanted - arrays.keys()))
    yield from (f"{name}: not an input of the model" for name in sorted(arrays.keys() - wanted))


def _array_problems(arrays: Arrays, wanted: Sequence[Input], length_max: int) -> Iterator[str]:
    sizes: dict[str, int] = {}
    for row in wanted:
        array = arrays[row.name]
        if not row.fits(array, sizes):
            yield f"{row.name}: expected {row}, got {array.dtype}{list(array.shape)}"
        elif not array.size:
            yield f"{row.name}: no sample" if not len(array) else f"{row.name}: nothing in its rows"
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            yield f"{row.name}: NaN or infinity in it"
        elif array.dtype.kind in "iu":
            yield from _id_problems(row, array)
    if length_max and sizes.get(_SEQ, 0) > length_max:
        yield f"{sizes[_SEQ]} tokens a row, the model takes at most {length_max}"


def _id_problems(row: Input, array: Array) -> Iterator[str]:
    below = 2 if row.name == _MASK else row.below or None
    ids = array.astype(np.int64)
    wrong = ids < 0 if below is None else (ids < 0) | (ids >= below)
    if wrong.any():
        place = np.unravel_index(int(wrong.argmax()), wrong.shape)
        shown = f"0 to {below - 1}" if below else "0 or more"
        where = ", ".join(map(str, place))
        yield f"{row.name}: {int(wrong.sum())} out of range, the first is {ids[place]} at [{where}]; expected {shown}"


def _label_problems(arrays: Arrays, first: Input, manifest: Manifest) -> Iterator[str]:
    labels, per_token = arrays[manifest.label_name], manifest.task in _PER_TOKEN
    want = arrays[first.name].shape[: 2 if per_token else 1]
    if labels.dtype.kind not in "iu" or labels.shape != want:
        yield f"{manifest.label_name}: expected integers {list(want)}, got {labels.dtype}{list(labels.shape)}"
        return
    classes = labels.astype(np.int64)
    judged = classes[classes != IGNORED] if per_token else classes
    top = _top_label(manifest)
    wrong = judged[(judged < 0) | (judged > top)]
    if wrong.size:
        yield f"{manifest.label_name}: {wrong.size} out of range, the first is {wrong[0]}; expected 0 to {top}"


def _top_label(manifest: Manifest) -> int:
    """The highest class; of a causal language model the highest token, as far as that is known."""
    if manifest.task != "causal-lm":
        return len(manifest.labels) - 1
    below = {row.name: row.below for row in manifest.inputs}
    known = [limit for limit in (below[manifest.label_name], below.get("input_ids", 0)) if limit]
    return min(known, default=int(np.iinfo(np.int64).max)) - 1
