"""A user's own labelled file as lines by device and a held-out test, for the demo."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fleetune.device_runtime.data.columns import REMEDY, Columns
from fleetune.device_runtime.data.records import Label, LabelledText, read_records
from fleetune.device_runtime.errors import DataError
from fleetune.toolkit.utterances import Corpus, Utterance, by_speaker

SPEAKER_FIELDS = ("speaker", "client", "device")
_TEST_SHARE = 0.2
_LABEL_CONCENTRATION = 1.0


def read_corpus(path: Path, *, num_devices: int, seed: int = 0, columns: Columns = Columns()) -> Corpus:
    """Read JSON lines or CSV as devices do, hold out a fifth, and share the rest out.

    Lines go to devices by their ``speaker``, ``client`` or ``device`` field if all have one, else by a
    Dirichlet draw per label, so that the devices' labels are skewed. ``columns`` say where a line has text and label.

    Raises:
        DataError: unreadable, a line without ``text`` or ``label`` (its number is named), or too few lines.
    """
    lines = list(_read(path, columns))
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


class _Line(LabelledText, frozen=True, kw_only=True):
    """A labelled text, and perhaps whose it is."""

    speaker: Label | None = None
    client: Label | None = None
    device: Label | None = None


def _read(path: Path, columns: Columns) -> Iterator[Utterance]:
    for source, line in read_records(path, columns.of(_Line), remedy=REMEDY):
        label = str(line.label).strip()
        if not label:
            raise source.error("no label")
        named = (getattr(line, field) for field in SPEAKER_FIELDS)
        yield Utterance(line.text, label, next((str(name) for name in named if name is not None), ""))


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
