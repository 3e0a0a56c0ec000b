import numpy as np
import pytest
from fleet import FOUR, LinearTraining, first_adapter, in_process, points_of, roughly, settings_of, world
from safetensors.numpy import load

from fleetune.broker.methods.strategies import STRATEGIES
from fleetune.device_runtime.arrays import to_bytes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_wire_gives_what_one_process_gives_to_the_bit(tmp_path, strategy):
    done = world(tmp_path, strategy=strategy, in_memory=True).run()
    for version in (1, 2, 3):
        expected = in_process(FOUR, rounds=version, settings=settings_of(strategy=strategy))
        assert done.aggregator.version(version) == expected


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_the_order_of_arrival(tmp_path, seed):
    done = world(tmp_path, seed=seed, in_memory=True).run()
    assert done.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())


def test_one_device_and_one_round_is_local_training(tmp_path):
    done = world(tmp_path, numbers=(2,), rounds=1, seed=5).run()
    local = LinearTraining(points_of(2), settings_of().work, first_adapter())
    while not local.done:
        local.step()
    assert done.aggregator.version(1) == to_bytes(local.adapter)


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_lossy_codec_comes_close_and_feeds_back(tmp_path, codec):
    done = world(tmp_path, numbers=(0, 1), codec=codec).run()
    exact = in_process((0, 1), rounds=3, settings=settings_of())
    found, wanted = load(done.aggregator.version(3)), load(exact)
    np.testing.assert_allclose(found["w"], wanted["w"], atol=1e-4)
    assert found["w"].tobytes() != wanted["w"].tobytes()
    assert list((done.devices[0].folder).glob("memory-*")), "what was not conveyed is kept"


def test_lost_doubled_and_damaged_messages_change_nothing(tmp_path):
    done = world(tmp_path, disturb=roughly(3)).run(turns=20_000)
    assert done.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())
