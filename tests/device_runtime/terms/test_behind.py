"""How many of a device's samples stand behind an update, worked out by hand."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.terms.behind import behind, num_used
from fleetune.device_runtime.training.held_out import split


def rows(count):
    columns = {"x": Dense(np.arange(count)), "labels": Dense(np.arange(count) % 2)}
    return make_dataset(columns, np.ones(count, int), seq_len=1, num_classes=2, label_name="labels")


@pytest.mark.parametrize(
    ("work", "num_samples", "samples", "batch", "steps"),
    [
        ({"steps": 1, "batch_size": 1}, 100, 1, 1, 1),
        ({"steps": 50, "batch_size": 1}, 10, 10, 1, 50),
        ({"steps": 1, "batch_size": 16}, 17, 1, 1, 1),
        ({"steps": 2, "batch_size": 16}, 17, 17, 1, 2),
        ({"steps": 2, "batch_size": 16}, 40, 24, 8, 2),
        ({"epochs": 3, "batch_size": 16}, 48, 48, 16, 9),
        ({"epochs": 1, "batch_size": 64}, 20, 20, 20, 1),
        ({"epochs": 1, "batch_size": 10, "held_out": 0.5}, 40, 20, 10, 2),
    ],
)
def test_samples_are_counted_once_and_the_short_batch_may_come_first(
    work, num_samples, samples, batch, steps
):
    assert behind(LocalWork(**work), num_samples) == (samples, batch, steps)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_samples", "size", "steps"), [(17, 16, 1), (40, 16, 2), (9, 4, 5), (30, 8, 3)])
def test_no_seed_touches_fewer(seed, num_samples, size, steps):
    work = LocalWork(steps=steps, batch_size=size, seed=seed)
    data, least = rows(num_samples), behind(work, num_samples)
    batches = [b for epoch in range(3) for b in data.epoch_batches(seed, epoch, size)][:steps]
    assert len({i for batch in batches for i in batch}) >= least.samples
    assert min(map(len, batches)) >= least.batch


def test_rows_gated_off_do_not_count_and_a_layer_may_have_the_steepest_rate():
    half = PolicySpec(name="exact-k", drop=0.5, gates="row")
    assert behind(LocalWork(policy=half), 16).batch == 8
    uneven = PolicySpec(name="exact-k", drop=0.5, gates="row", shape="decay")
    assert behind(LocalWork(policy=uneven), 16).batch == 1


@pytest.mark.parametrize("held_out", [0.0, 0.1, 0.37])
@pytest.mark.parametrize("num_samples", range(1, 70))
def test_spare_rows_do_not_train_and_then_no_batch_is_too_short(num_samples, held_out):
    work = LocalWork(batch_size=16, held_out=held_out)
    used = num_used(work, num_samples, least_batch=4)
    assert num_samples - (20 if held_out else 4) < used <= num_samples
    training = split(rows(used), held_out).training
    if num_samples > 16:
        assert min(map(len, training.epoch_batches(0, 0, 16))) >= 4
    assert behind(work, used).samples == training.num_samples


def test_without_a_floor_all_rows_train():
    assert num_used(LocalWork(batch_size=16), 17, least_batch=0) == 17
    assert num_used(LocalWork(batch_size=16), 17, least_batch=2) == 16
    assert num_used(LocalWork(batch_size=1), 17, least_batch=2) == 17, "nothing helps; it is declined"
