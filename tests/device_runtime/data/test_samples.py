import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.device_runtime.data.samples import Dense, Ragged, make_dataset
from fleetune.device_runtime.errors import ConfigError


def ragged(lengths, seq_len=64):
    lengths = np.array(lengths, np.int64)
    ids = np.concatenate([np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)])
    columns = {
        "input_ids": Ragged(ids, lengths, 0, "int64"),
        "labels": Dense(np.arange(len(lengths), dtype=np.int64)),
    }
    return make_dataset(columns, lengths, seq_len=seq_len, num_classes=len(lengths), label_name="labels")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=120),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_an_epoch_has_each_row_once_and_depends_on_seed_and_epoch(lengths, batch_size, seed, epoch):
    dataset = ragged(lengths)
    batches = dataset.epoch_batches(seed, epoch, batch_size)
    assert len(batches) == dataset.num_batches(batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    again = dataset.epoch_batches(seed, epoch, batch_size)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    for indices in batches[:3]:
        rows = dataset.rows(indices)["input_ids"]
        longest = max(lengths[i] for i in indices)
        assert longest <= rows.shape[1] < longest + 8
        assert all(
            (row != 0).sum() == lengths[i] and set(row) <= {0, i + 1}
            for i, row in zip(indices, rows, strict=True)
        )


def test_epochs_and_seeds_differ_and_like_lengths_go_together():
    dataset = ragged(np.random.default_rng(0).integers(1, 64, 400))
    orders = {
        tuple(np.concatenate(dataset.epoch_batches(s, e, 8)).tolist()) for s, e in ((0, 0), (0, 1), (1, 0))
    }
    assert len(orders) == 3
    spread = [np.ptp(dataset.lengths[indices]) for indices in dataset.epoch_batches(0, 0, 8)]
    assert np.mean(spread) < 5  # shuffled rows would differ by about 50


def test_ordered_batches_go_from_short_to_long():
    dataset = ragged([5, 1, 9, 1, 3])
    assert np.concatenate(dataset.ordered_batches(2)).tolist() == [1, 3, 4, 0, 2]


def test_a_subset_has_its_rows_in_order_and_a_digest_of_its_own():
    dataset = ragged([5, 1, 9])
    part = dataset.subset(np.array([2, 0]))
    assert part.rows(np.array([0, 1]))["input_ids"][:, :6].tolist() == [[3] * 6, [1] * 5 + [0]]
    assert part.labels.tolist() == [2, 0]
    assert part.digest != dataset.digest
    assert part.digest == ragged([5, 1, 9]).subset(np.array([2, 0])).digest


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="batch size must be at least 1, got 0"):
        ragged([1]).epoch_batches(0, 0, 0)
