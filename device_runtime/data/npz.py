"""Arrays as they are: NPZ files that hold the model's inputs by name, and ``labels``."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.manifest import Input, Manifest
from fleetune.device_runtime.data.answers import answer_problems, value_problems
from fleetune.device_runtime.data.npz_file import listed, read_npz
from fleetune.device_runtime.data.samples import IGNORED, Column, Cut, Dataset, Dense, make_dataset
from fleetune.device_runtime.errors import DataError

_PER_TOKEN = ("causal-lm", "token-classification")
"""Tasks with a label at every position, some of them IGNORED."""


_MASK = "attention_mask"
_SEQ = "seq"


def load_npz(
    path: Path, manifest: Manifest, *, seq_len: int, length_max: int = 0, labelled: bool = True
) -> Dataset:
    """Read arrays of exactly the names, shapes and dtypes of the manifest; integer labels of any width are class indices.

    Labels of a regression are numbers, (N,) or (N, outputs), those of label sets 0 and 1, (N, labels), of any dtype.

    Args:
        path: the file.
        manifest: names the inputs.
        seq_len: kept in the data set's digest; rows are not cut.
        length_max: the most tokens that the model takes; 0 where that is not known.
        labelled: False reads the inputs alone.

    Raises:
        DataError: no NPZ file, or names, shapes, dtypes, ids or labels that do not fit (all listed).
    """
    wanted, label_name = manifest.features, manifest.label_name

    def form_problems(forms: Arrays) -> list[str]:
        names = {row.name for row in wanted} | ({label_name} if labelled else set())
        found = [*_name_problems(forms, names)] or [*_form_problems(forms, wanted, length_max)]
        return found or ([*_label_form_problems(forms, wanted[0], manifest)] if labelled else [])

    arrays = read_npz(path, problems=form_problems, skip="" if labelled else label_name)
    problems = [said for row in wanted for said in _value_problems(row, arrays[row.name])]
    if labelled:
        problems += _label_problems(arrays[label_name], manifest)
    if problems:
        raise DataError(f"{path}: " + "; ".join(problems))
    return dense_dataset(arrays, manifest, seq_len=seq_len, labelled=labelled)


def dense_dataset(
    arrays: Arrays, manifest: Manifest, *, seq_len: int, labelled: bool, cut: Cut | None = None
) -> Dataset:
    """Put arrays of one row a sample together, which fit the manifest, labels among them if ``labelled``."""
    wanted, label_name = manifest.features, manifest.label_name
    columns: dict[str, Column] = {row.name: Dense(arrays[row.name]) for row in wanted}
    if labelled:
        columns[label_name] = Dense(arrays[label_name].astype(manifest.inputs[manifest.label_index].dtype))
    lengths = np.ones(len(arrays[wanted[0].name]), np.int64)
    return make_dataset(
        columns,
        lengths,
        seq_len=seq_len,
        num_classes=len(manifest.labels),
        label_name=label_name if labelled else "",
        cut=cut,
    )


def _name_problems(forms: Arrays, wanted: set[str]) -> Iterator[str]:
    yield from (f"{name}: missing" for name in sorted(wanted - forms.keys()))
    if unknown := forms.keys() - wanted:
        yield f"{listed(unknown)}: not an input of the model"


def _form_problems(forms: Arrays, wanted: Sequence[Input], length_max: int) -> Iterator[str]:
    sizes: dict[str, int] = {}
    for row in wanted:
        form = forms[row.name]
        if not row.fits(form, sizes):
            yield f"{row.name}: expected {row}, got {form.dtype}{list(form.shape)}"
        elif not form.size:
            yield f"{row.name}: no sample" if not len(form) else f"{row.name}: nothing in its rows"
    if length_max and sizes.get(_SEQ, 0) > length_max:
        yield f"{sizes[_SEQ]} tokens a row, the model takes at most {length_max}"


def _label_form_problems(forms: Arrays, first: Input, manifest: Manifest) -> Iterator[str]:
    labels = forms[manifest.label_name]
    if manifest.problem_type:
        yield from answer_problems(labels, manifest, len(forms[first.name]))
        return
    want = forms[first.name].shape[: 2 if manifest.task in _PER_TOKEN else 1]
    if labels.dtype.kind not in "iu" or labels.shape != want:
        yield f"{manifest.label_name}: expected integers {list(want)}, got {labels.dtype}{list(labels.shape)}"


def _value_problems(row: Input, array: Array) -> Iterator[str]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        yield f"{row.name}: NaN or infinity in it"
    elif array.dtype.kind in "iu":
        yield from _id_problems(row, array)


def _id_problems(row: Input, ids: NDArray[Any]) -> Iterator[str]:
    below = 2 if row.name == _MASK else row.below or None
    wrong = ids < 0 if below is None else (ids < 0) | (ids >= below)
    if wrong.any():
        place = np.unravel_index(int(wrong.argmax()), wrong.shape)
        shown = f"0 to {below - 1}" if below else "0 or more"
        where = ", ".join(map(str, place))
        yield f"{row.name}: {int(wrong.sum())} out of range, the first is {ids[place]} at [{where}]; expected {shown}"


def _label_problems(labels: NDArray[Any], manifest: Manifest) -> Iterator[str]:
    if manifest.problem_type:
        yield from value_problems(labels, manifest)
        return
    judged = labels[labels != IGNORED] if manifest.task in _PER_TOKEN else labels
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
