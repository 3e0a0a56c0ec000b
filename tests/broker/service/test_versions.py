import numpy as np
import pytest
from fleet import (
    FOUR,
    Aggregator,
    Device,
    LinearTraining,
    World,
    first_adapter,
    in_process,
    points_of,
    roughly,
    settings_of,
    world,
)
from layered import bench_of, first, trained, work_of
from safetensors.numpy import load

from fleetune.broker.methods.strategies import STRATEGIES
from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.network.loopback import Loopback


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


def test_each_layer_is_the_mean_over_the_devices_that_share_it(tmp_path):
    """Layer 0 stays on both devices and never changes; 1 on the first, 2 on the second in the second round alone."""
    server, job = Loopback(), {"clients": 2, "min_clients": 2, "rounds": 2, "work": work_of(0, personal=2)}
    aggregator = Aggregator(server, tmp_path, adapter=first(), **job).start()
    stay, starts = ([(0, 1), (0,)], [(0, 1), (0, 2)]), ([], [])
    kept = [lambda _, mine=mine, at=at: stay[len(at) - 1][mine] for mine, at in enumerate(starts)]
    benches = [bench_of(kept[i], starts[i], num_samples=n) for i, n in enumerate((9, 3))]
    adapter = FirstAdapter.of(first())
    devices = [Device(server, tmp_path, i, workbench=benches[i], adapter=adapter).start() for i in (0, 1)]
    World(server, aggregator, devices).run()
    before = first()
    for number in (0, 1):
        (a, b), found = (trained(*mine[number]) for mine in starts), load(aggregator.version(number + 1))
        wanted = {
            "head": (9 * a["head"] + 3 * b["head"]) / 12,
            "layer0.a": before["layer0.a"],
            "layer1.a": b["layer1.a"],
        }
        wanted["layer2.a"] = a["layer2.a"] if number else (9 * a["layer2.a"] + 3 * b["layer2.a"]) / 12
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert found["layer0.a"].tobytes() == before["layer0.a"].tobytes()
        before = found
    assert starts[0][1][1]["layer1.a"].tobytes() == trained(*starts[0][0])["layer1.a"].tobytes()
    assert starts[0][1][1]["layer2.a"].tobytes() == load(aggregator.version(1))["layer2.a"].tobytes()
