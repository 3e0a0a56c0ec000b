"""What a row's label is where it is no class: a number for each output of a regression, or any of the labels.

Shapes: K outputs, or labels, of the model.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Floats
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.data.labels import class_reader
from fleetune.device_runtime.data.records import Label, Text
from fleetune.device_runtime.data.rows import Source
from fleetune.device_runtime.errors import one_line, some
from fleetune.device_runtime.prepared import prepared

SEPARATOR = ";"
"""Between the labels of a text cell."""
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_FLOAT_MAX = float(np.finfo(np.float32).max)
_EXAMPLE = "expected one such as 3.5"

Labels = list[Label]


class NumberedText(Text, frozen=True, kw_only=True):
    """A text or pair with the number that a regression of one output answers."""

    label: Label


class AnsweredText(Text, frozen=True, kw_only=True):
    """A text or pair with several labels, or several numbers: a list, or a text that has one in it."""

    labels: Labels | str


def labelled_kind(manifest: Manifest) -> type[msgspec.Struct]:
    """What a row of text must be for a model of numbers or label sets."""
    is_number = manifest.problem_type == "regression" and len(manifest.labels) == 1
    return NumberedText if is_number else AnsweredText


def read_answers(records: Sequence[tuple[Source, Any]], manifest: Manifest) -> Floats:
    """Labels of rows as the model learns them: float32 (N,) of one output, (N, K) of several, or zeros and ones (N, K).

    Raises:
        DataError: what is no finite number, not one for each output, or no label; names the line.
    """
    if manifest.problem_type == "regression" and len(manifest.labels) == 1:
        return np.array([_number(record.label, source) for source, record in records], np.float32)
    read = _numbers_reader(manifest) if manifest.problem_type == "regression" else _set_reader(manifest)
    return np.array([read(record.labels, source) for source, record in records], np.float32)


def answer_problems(labels: NDArray[Any], manifest: Manifest, num_rows: int) -> Iterator[str]:
    """Say why an array of labels is not what :func:`read_answers` makes; integers will do."""
    name, wanted = manifest.label_name, _shape(manifest, num_rows)
    kinds = "iuf" if manifest.problem_type == "regression" else "iufb"
    if labels.dtype.kind not in kinds or labels.shape != wanted:
        yield f"{name}: expected numbers {list(wanted)}, got {labels.dtype}{list(labels.shape)}"


def value_problems(labels: NDArray[Any], manifest: Manifest) -> Iterator[str]:
    """Say which values of such an array are no labels, the first one with its place."""
    if manifest.problem_type == "regression":
        with np.errstate(over="ignore"):
            wrong, expected = ~np.isfinite(labels.astype(np.float32)), "finite numbers"
    else:
        wrong, expected = (labels != 0) & (labels != 1), "0 or 1"
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        shown = ", ".join(map(str, place))
        yield f"{manifest.label_name}: {labels[place]} at [{shown}]; expected {expected}"


def _shape(manifest: Manifest, num_rows: int) -> tuple[int, ...]:
    sizes = manifest.inputs[manifest.label_index].shape[1:]
    return (num_rows, *(int(size) for size in sizes))


def _number(label: Label, source: Source) -> float:
    found = _as_number(label)
    if found is None:
        shown = repr(label) if isinstance(label, str) else str(label).lower()
        raise source.error(f"label {one_line(shown, length_max=80)} is no number; {_EXAMPLE}")
    if not math.isfinite(found) or abs(found) > _FLOAT_MAX:
        raise source.error(f"label {one_line(str(label), length_max=80)} is no finite number; {_EXAMPLE}")
    return found


def _as_number(label: Label) -> float | None:
    if isinstance(label, bool):
        return None
    if isinstance(label, str):
        is_named = label.strip().lower().lstrip("+-") in ("nan", "inf", "infinity")
        return float(label) if is_named or _NUMBER.fullmatch(label) else None
    try:
        return float(label)
    except OverflowError:
        return math.inf


def _numbers_reader(manifest: Manifest) -> Callable[[Labels | str, Source], list[float]]:
    names = manifest.labels

    def read(given: Labels | str, source: Source) -> list[float]:
        values = [_number(one, source) for one in _listed(given, source)]
        if len(values) != len(names):
            raise source.error(f"{len(values)} numbers, expected {len(names)}: {some(names, at_most=10)}")
        return values

    return read


def _set_reader(manifest: Manifest) -> Callable[[Labels | str, Source], Array]:
    """Make what turns labels into zeros and ones (K,): names, or a row of 0.0 and 1.0, or of true and false."""
    names, read_class = manifest.labels, class_reader(manifest.labels)

    def read(given: Labels | str, source: Source) -> Array:
        is_name = isinstance(given, str) and given in names
        labels: Labels = [str(given)] if is_name else _listed(given, source)
        if len(labels) == len(names) and _is_row(labels):
            return np.array([float(one) for one in labels], np.float32)
        _refuse_bits(labels, names, source)
        found = [read_class(label, source) for label in labels]
        row = np.zeros(len(names), np.float32)
        row[found] = 1
        if int(row.sum()) < len(found):
            raise source.error(f"a label is named twice: {some([str(one) for one in labels], at_most=10)}")
        return row

    return read


def _is_row(labels: Labels) -> bool:
    is_bits = all(isinstance(one, bool) for one in labels)
    return is_bits or all(isinstance(one, float) and one in (0.0, 1.0) for one in labels)


def _refuse_bits(labels: Labels, names: Sequence[str], source: Source) -> None:
    """Whole numbers 0 and 1, as many as there are labels, may be a row of bits or the numbers of two labels."""
    if len(labels) == len(names) and all(type(one) is int and one in (0, 1) for one in labels):
        raise source.error(
            f"labels {labels} may be a row of 0 and 1, or the numbers of labels; write names, 0.0 and 1.0, or true and false"
        )


def _listed(given: Labels | str, source: Source) -> Labels:
    """The members of a list, of a JSON list in a text, or of a text with separators; a text without content has none."""
    if not isinstance(given, str):
        return given
    text = given.strip()
    if not text.startswith("["):
        return [part.strip() for part in text.split(SEPARATOR) if part.strip()]
    try:
        return msgspec.json.decode(text, type=prepared(Labels))
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise source.error(
            f"labels {one_line(text, length_max=80)} are no JSON list ({exc}); write a{SEPARATOR}b"
        ) from exc
