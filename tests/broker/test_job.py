import pytest
from rounds_by_hand import job

from fleetune.broker.job import Patience, check_settings, device_work, differences
from fleetune.device_runtime.contracts.wire import LocalWork, OptimizerSpec
from fleetune.device_runtime.errors import ConfigError, UnknownName


def test_settings_are_checked_together():
    with pytest.raises(ConfigError) as caught:
        check_settings(
            job(
                rounds=0,
                clients=2,
                min_clients=3,
                work=LocalWork(batch_size=0, optimizer=OptimizerSpec(name="x")),
            ),
            Patience(deadline_s=-1),
            num_layers=4,
        )
    for said in (
        "rounds must be at least 1, got 0",
        "min_clients 3: from 1 to clients (2)",
        "batch_size must be at least 1, got 0",
        "no optimizer 'x'; have: adamw, sgd",
        "deadline_s must be at least 0, got -1",
    ):
        assert said in str(caught.value)
    with pytest.raises(UnknownName, match="no strategy 'x'"):
        check_settings(job(strategy="x"), Patience(), num_layers=4)
    with pytest.raises(ConfigError, match="job 'a/b'"):
        check_settings(job(job="a/b"), Patience(), num_layers=4)


def test_every_device_of_every_round_has_a_seed_of_its_own():
    seeds = [device_work(job(seed=5), round_number=r, position=p).seed for r in (1, 2, 3) for p in range(50)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 150


def test_every_device_of_a_round_knows_how_many_came_before():
    works = [device_work(job(), round_number=r, position=p) for r in (1, 2, 3) for p in range(2)]
    assert [work.rounds_before for work in works] == [0, 0, 1, 1, 2, 2]


def test_differences_name_the_fields():
    assert differences(job(), job(clients=3)) == ["clients: 2, was 3"]
