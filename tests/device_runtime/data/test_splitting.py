import numpy as np
import pytest

from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.data.splitting import split_off
from fleetune.device_runtime.draws import Key, permutation
from fleetune.device_runtime.errors import DataError


def rows(labels):
    columns = {"x": Dense(np.arange(len(labels), dtype=np.float32)), "labels": Dense(np.asarray(labels))}
    return make_dataset(
        columns, np.ones(len(labels), np.int64), seq_len=1, num_classes=3, label_name="labels"
    )


def numbers(dataset):
    return dataset.columns["x"].values.astype(int).tolist()


def test_each_class_gives_its_share_and_no_row_is_in_both():
    parts = split_off(rows([0] * 50 + [1] * 30 + [2] * 4), 0.1, seed=0, source="a.csv")
    assert parts.held.histogram() == (5, 3, 0)
    assert sorted(numbers(parts.training) + numbers(parts.held)) == [*range(84)]
    assert numbers(parts.held) == sorted(numbers(parts.held))


def test_the_split_is_of_the_seed_alone():
    data = rows([0, 1] * 40)
    held = [numbers(split_off(data, 0.25, seed=seed, source="a").held) for seed in (3, 3, 4)]
    assert held[0] == held[1] != held[2]
    even, odd = (permutation(Key(3, "eval-split", 0, part), 40)[:10] for part in range(2))
    assert held[0] == sorted([*(2 * even), *(2 * odd + 1)])


def test_every_class_keeps_a_row_to_learn_from():
    assert split_off(rows([0, 0, 1, 1]), 0.99, seed=0, source="a").training.histogram() == (1, 1, 0)


def test_rows_without_one_class_each_are_all_of_one():
    values = np.arange(20)
    made = make_dataset({"x": Dense(values)}, np.ones(20, np.int64), seq_len=1, num_classes=0)
    assert split_off(made, 0.1, seed=0, source="a").held.num_samples == 2


@pytest.mark.parametrize(
    ("labels", "share", "message"),
    [
        ([1, 1, 1], 0.5, "a.csv: all 3 samples are of one class: add samples of another"),
        ([0, 1], 0.5, "a.csv: an evaluation split of 0.5 holds out no sample; raise it, bring more than 2"),
        (
            [0] * 20 + [1],
            0.1,
            "holds out samples of one class alone; raise it, bring more than 21 samples, or give --eval",
        ),
    ],
)
def test_a_split_that_tells_nothing_is_refused(labels, share, message):
    with pytest.raises(DataError, match=message):
        split_off(rows(labels), share, seed=0, source="a.csv")
