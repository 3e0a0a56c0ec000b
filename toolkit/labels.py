"""Names of the classes: from a list, a file, a count or the checkpoint; no torch."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.device_runtime.contracts.manifest import ProblemType
from fleetune.device_runtime.errors import ConfigError, UnknownName, choices, some
from fleetune.device_runtime.tables import Table

HAS_CLASSES: Table[bool] = Table(
    "task",
    {
        "sequence-classification": True,
        "token-classification": True,
        "causal-lm": False,
        "image-classification": True,
        "audio-classification": True,
    },
)
"""Every task of ``tasks.TASKS``, and whether its labels are of classes with names."""

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
"""What a row's label may be, as transformers calls it."""
_WHOLE_ROW = ("sequence-classification", "image-classification", "audio-classification")
"""Tasks with one answer for a row."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, the longer before those that they begin with."""
_PLACEHOLDER = re.compile(r"(?i)label_?\d+")
"""As transformers names the classes of a checkpoint without names."""


def read_labels(labels: Sequence[str] | str | Path | None, num_labels: int | None) -> list[str]:
    """Class names from a list, a file or a count, without the space around them.

    Raises:
        ConfigError: neither given, both but different, doubled or empty names, fewer than two, or an unreadable file.
    """
    if labels is None and num_labels is None:
        raise ConfigError("give --num-labels N or --labels FILE")
    if labels is None:
        names = [f"label_{i}" for i in range(num_labels or 0)]
    else:
        names = _names(labels)
    if num_labels is not None and len(names) != num_labels:
        raise ConfigError(f"{num_labels} classes, but {len(names)} labels are named: {_listed(names)}")
    _check(names)
    return names


def _names(labels: Sequence[str] | str | Path) -> list[str]:
    given = _from_file(Path(labels)) if isinstance(labels, (str, Path)) else labels
    return [str(name).strip() for name in given]


def names_in(config: Mapping[str, Any]) -> list[str]:
    """Class names of a checkpoint's configuration; none where it has only placeholders."""
    table = config.get("id2label")
    if not isinstance(table, Mapping):
        return []
    names = [str(table.get(i, table.get(str(i), ""))).strip() for i in range(len(table))]
    is_named = all(names) and len(set(names)) == len(names) > 1
    return names if is_named and not any(map(_PLACEHOLDER.fullmatch, names)) else []


def choose_labels(
    labels: Sequence[str] | str | Path | None,
    num_labels: int | None,
    *,
    config: Mapping[str, Any],
    tell: Callable[[str], None],
) -> list[str]:
    """As ``read_labels``; where no names are given, those of the checkpoint, if they are as many as asked."""
    own = names_in(config)
    if labels is None and own and num_labels in (None, len(own)):
        tell(f"labels: as the checkpoint names them, {_listed(own)}")
        return own
    return read_labels(labels, num_labels)


def choose_problem(
    given: str | None,
    *,
    task: str,
    num_labels: int | None,
    config: Mapping[str, Any],
    tell: Callable[[str], None],
) -> ProblemType:
    """Say what a row's label is: as given, else as the checkpoint has it, if it has as many outputs as are asked for.

    Raises:
        ConfigError: no such problem type, or one of a task with other labels.
    """
    if given is not None and given not in PROBLEM_TYPES:
        raise UnknownName(f"no problem type {given!r}; have: {choices(PROBLEM_TYPES)}")
    if task not in _WHOLE_ROW:
        if given is not None:
            raise ConfigError(f"--problem-type is for {choices(_WHOLE_ROW)}; the task is {task}")
        return ""
    if given is not None:
        return _problem(given)
    num_own = len(config["id2label"]) if isinstance(config.get("id2label"), Mapping) else 2
    own = _problem(config.get("problem_type") or (PROBLEM_TYPES[-1] if num_own == 1 else ""))
    if not own or num_labels not in (None, num_own):
        return ""
    tell(f"problem type: {own}, as the checkpoint's; --problem-type {PROBLEM_TYPES[0]} for one class a row")
    return own


def name_outputs(labels: Sequence[str] | str | Path | None, num_labels: int | None) -> list[str]:
    """Name the outputs of a regression: as given, else ``value``, or ``value_0`` and so on; errors as of :func:`read_labels`."""
    if num_labels is not None and num_labels < 1:
        raise ConfigError(f"--num-labels {num_labels}: expected 1 or more outputs")
    if labels is None:
        return ["value"] if num_labels in (None, 1) else [f"value_{i}" for i in range(num_labels or 0)]
    names = _names(labels)
    return names if len(names) == 1 == (num_labels or 1) else read_labels(names, num_labels)


def _problem(name: object) -> ProblemType:
    return name if name == "regression" or name == "multi_label_classification" else ""


def compare_labels(given: Sequence[str], config: Mapping[str, Any], *, tell: Callable[[str], None]) -> None:
    """Tell what the checkpoint's head, which is kept, calls its classes, if other than ``given`` or in other order."""
    own = names_in(config)
    if not own or own == list(given):
        return
    how = "in another order" if sorted(own) == sorted(given) else "by other names"
    tell(
        f"labels: the checkpoint's head knows them {how}: {_listed(own)}; given {_listed(given)}. Its head is kept"
    )


def _listed(names: Sequence[str]) -> str:
    return some(names, at_most=8)


def _check(names: Sequence[str]) -> None:
    if not all(names):
        raise ConfigError(f"label {names.index('') + 1} of {len(names)} is empty")
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if len(names) == 1:
        raise ConfigError(
            "1 label: expected two or more; a model of one output is a regression: give --problem-type regression"
        )
    if len(names) < 2 or doubled:
        twice = f"; more than once: {_listed(doubled)}" if doubled else ""
        distinct = f"{len(names)} labels, {len(set(names))} of them distinct"
        raise ConfigError(f"{distinct}: expected two or more, each once{twice}")


def _from_file(path: Path) -> Sequence[str]:
    text = _decoded(path)
    if not text.lstrip().startswith(("[", "{")):
        return [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}: neither a JSON list nor one label a line: {exc}") from exc
    if not isinstance(found, list) or not all(type(name) in (str, int) for name in found):
        raise ConfigError(f"{path}: expected a JSON list of names")
    return [str(name) for name in found]


def _decoded(path: Path) -> str:
    """The file's text, whatever mark it begins with; UTF-8 without one."""
    try:
        data = path.read_bytes()
        encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
        text = data.decode(encoding)
    except OSError as exc:
        raise ConfigError(f"{path}: labels cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: labels are not UTF-8 ({exc.reason}); save the file as UTF-8") from exc
    if "\0" in text:
        raise ConfigError(f"{path}: labels are not UTF-8 (they hold zero bytes); save the file as UTF-8")
    return text
