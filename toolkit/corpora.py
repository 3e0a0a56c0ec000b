"""A user's own labelled file as lines by device and a held-out test, for the demo."""

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.device_runtime.errors import DataError
from fleetune.toolkit.utterances import Corpus, Utterance, by_speaker

SPEAKER_FIELDS = ("speaker", "client", "device")
_TEST_SHARE = 0.2
_LABEL_CONCENTRATION = 1.0


def read_corpus(path: Path, *, num_devices: int, seed: int = 0) -> Corpus:
    """Read JSON lines (``.jsonl``, ``.jsonl.gz``) or CSV, hold out a fifth, and share the rest out.

    Lines go to devices by their ``speaker``, ``client`` or ``device`` field if all have one, else by a
    Dirichlet draw per label, so that the devices' labels are skewed.

    Raises:
        DataError: unreadable, a line without ``text`` or ``label`` (its number is named), or too few lines.
    """
    lines = list(_read(path))
    order = np.random.default_rng(seed).permutation(len(lines))
    num_test = round(_TEST_SHARE * len(lines))
    test, train = ([lines[i] for i in part] for part in np.split(order, [num_test]))
    if len({line.label for line in train}) < 2 or len(test) < 1:
        raise DataError(
            f"{path}: {len(lines)} lines are too few: need at least two labels and something to hold out"
        )
    groups = (
        _group(train, num_devices) if all(line.speaker for line in train) else _deal(train, num_devices, seed)
    )
    if any(not group for group in groups):
        raise DataError(f"{path}: {len(train)} training lines do not reach {num_devices} devices")
    return Corpus({f"device-{i}": group for i, group in enumerate(groups)}, test)


def _read(path: Path) -> Iterator[Utterance]:
    for number, row in _rows(path):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("text"), str)
            or row.get("label") in (None, "")
        ):
            raise DataError(f'{path}:{number}: expected "text" and "label", got {str(row)[:80]}')
        speaker = next((str(row[field]) for field in SPEAKER_FIELDS if row.get(field) is not None), "")
        yield Utterance(row["text"], str(row["label"]), speaker)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as file
        ):
            if path.suffix == ".csv":
                yield from enumerate(csv.DictReader(file), start=2)
                return
            for number, line in enumerate(file, start=1):
                yield number, _parse(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path}: cannot be read: {exc}") from exc


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as exc:
        raise DataError(f"{path}:{number}: not a JSON line: {exc}") from exc


def _group(lines: Sequence[Utterance], num_groups: int) -> list[list[Utterance]]:
    """Whole speakers into ``num_groups`` groups, the longest first into the shortest group."""
    groups: list[list[Utterance]] = [[] for _ in range(num_groups)]
    for spoken in sorted(by_speaker(lines).values(), key=len, reverse=True):
        min(groups, key=len).extend(spoken)
    return groups


def _deal(lines: Sequence[Utterance], num_groups: int, seed: int) -> list[list[Utterance]]:
    rng = np.random.default_rng([seed, 1])
    groups: list[list[Utterance]] = [[] for _ in range(num_groups)]
    for label in sorted({line.label for line in lines}):
        own = [line for line in lines if line.label == label]
        shares = rng.dirichlet(np.full(num_groups, _LABEL_CONCENTRATION))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(own)).astype(int)
        for group, part in zip(groups, np.split(np.arange(len(own)), cuts), strict=True):
            group.extend(own[i] for i in part)
    return groups
