import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.device_runtime.data.packing import packed
from fleetune.device_runtime.data.samples import Dense, Ragged, make_dataset
from fleetune.device_runtime.errors import ConfigError

ROOM = 16


def dataset(lengths, *, room=ROOM):
    lengths = np.array(lengths, np.int64)
    ids = np.arange(lengths.sum(), dtype=np.int32)
    columns = {name: Ragged(ids, lengths, pad, "int64") for name, pad in (("input_ids", 0), ("labels", -100))}
    return make_dataset(columns, lengths, seq_len=room, num_classes=0, label_name="labels")


@given(st.lists(st.integers(1, ROOM), min_size=1, max_size=40))
def test_each_text_is_in_one_sequence_whole_and_its_first_token_is_not_asked_for(lengths):
    plain = dataset(lengths)
    found = packed(plain, apart=True)
    assert found.lengths.max() <= ROOM
    assert found.lengths.sum() == plain.lengths.sum()
    starts = (np.cumsum(plain.lengths) - plain.lengths).tolist()
    ids, labels = found.columns["input_ids"].values.tolist(), found.columns["labels"].values.tolist()
    assert sorted(ids) == list(range(len(ids)))
    for start, length in zip(starts, lengths, strict=True):
        at = ids.index(start)
        assert ids[at : at + length] == list(range(start, start + length))
        assert labels[at : at + length] == [-100, *range(start + 1, start + length)]
    ends = np.cumsum(found.lengths)
    assert all(np.searchsorted(ends, ids.index(s), "right") == np.searchsorted(ends, ids.index(s + n - 1), "right")
               for s, n in zip(starts, lengths, strict=True))  # fmt: skip
    assert packed(plain, apart=True).digest == found.digest


def test_the_longest_go_first_each_where_it_fits_best():
    found = packed(dataset([4, 9, 7, 5, 12, 3]), apart=True)
    assert found.lengths.tolist() == [16, 16, 8]  # 4 + 12, 9 + 7, 5 + 3
    assert packed(dataset([10, 10, 10]), apart=True).lengths.tolist() == [10, 10, 10]


def test_rows_of_one_shape_are_refused():
    columns = {"input_ids": Dense(np.zeros((3, 4), np.int64))}
    rows = make_dataset(columns, np.ones(3, np.int64), seq_len=4, num_classes=0)
    with pytest.raises(
        ConfigError, match="packing: input_ids has rows of one shape; only texts can be packed"
    ):
        packed(rows, apart=True)


@pytest.mark.parametrize("apart", [True, False])
def test_the_mask_numbers_the_texts_of_a_sequence_if_they_are_to_be_held_apart(apart):
    lengths = np.array([4, 9, 7, 5, 12, 3], np.int64)
    columns = {
        name: Ragged(np.ones(40, np.int32), lengths, 0, "int64")
        for name in ("input_ids", "attention_mask", "labels")
    }
    plain = make_dataset(columns, lengths, seq_len=ROOM, num_classes=0, label_name="labels")
    mask = packed(plain, apart=apart).rows(np.arange(3))["attention_mask"]
    wanted = [[1] * 4 + [2] * 12, [1] * 9 + [2] * 7, [1] * 5 + [2] * 3 + [0] * 8]
    assert mask.tolist() == (wanted if apart else [[min(k, 1) for k in row] for row in wanted])
