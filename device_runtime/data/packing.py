"""Short sequences put together, so that less of a batch is padding.

The attention mask of a packed row numbers its texts (1, 2, …), by which the engine holds them apart: no token sees another
text, and each text begins at the first position. Where the graphs cannot (:func:`holds_apart`), the mask is of ones, and a token
sees the texts before its own. The first token of a text is not to be guessed from the text before it. Ours is which text goes
where: the longest first, each into the fullest sequence that has room (best fit decreasing).
"""

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.texts_apart import MASK
from fleetune.device_runtime.data.samples import IGNORED, Dataset, Dense, Ragged, make_dataset
from fleetune.device_runtime.errors import ConfigError

NOT_APART = "packing: this artifact's graphs hold no texts apart: each sees those before it in its sequence"


def packed(dataset: Dataset, *, apart: bool) -> Dataset:
    """Put the rows of a data set together, up to its ``seq_len`` tokens; none is cut, and each is in one sequence whole.

    Args:
        dataset: of texts.
        apart: whether they are numbered for the engine to hold them apart.

    Raises:
        ConfigError: rows of one shape, as arrays are.
    """
    label_name = dataset.label_name
    groups = _groups(dataset.lengths, dataset.seq_len)
    order = np.concatenate([np.array(group, np.int64) for group in groups])
    lengths = np.array([int(dataset.lengths[group].sum()) for group in groups], np.int64)
    columns = {}
    for name, column in dataset.subset(order).columns.items():
        if isinstance(column, Dense):
            raise ConfigError(f"packing: {name} has rows of one shape; only texts can be packed")
        values = column.values
        if name == label_name:
            values = values.copy()
            values[np.cumsum(column.lengths) - column.lengths] = IGNORED
        if name == MASK and apart:
            values = np.repeat(
                np.concatenate([np.arange(1, len(group) + 1) for group in groups]), column.lengths
            )
        columns[name] = Ragged(values, lengths, column.pad, column.dtype)
    return make_dataset(
        columns,
        lengths,
        seq_len=dataset.seq_len,
        num_classes=dataset.num_classes,
        label_name=label_name,
        cut=dataset.cut,
    )


def _groups(lengths: Indices, room: int) -> list[list[int]]:
    """Rows by the sequence that they are put into; sequences in the order of their first rows."""
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            free = rooms[at]
            group = by_room[free].pop()
            if not by_room[free]:
                rooms.pop(at)
        else:
            free, group = max(room, length), len(groups)
            groups.append([])
        groups[group].append(row)
        if left := free - length:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(group)
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])
