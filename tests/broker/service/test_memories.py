"""What both sides remember of a device's updates: the same model through every death, and no wrong one from two memories."""

import numpy as np
import pytest
from fleet import FOUR, STEPS, in_process, settings_of, spoken, world
from safetensors.numpy import load

from fleetune.broker.store import memories as module
from fleetune.broker.store.memories import Memories
from fleetune.device_runtime.contracts.codecs import chain_named, make_codec, pack, unpack
from fleetune.device_runtime.contracts.wire import Offer
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import WireError

SETTINGS = {"work": LocalWork(steps=STEPS, codec="innovation", codec_bits=6)}
HELD = {"w": np.zeros(300, np.float32)}


def memory_of(seed):
    value = np.random.default_rng(seed).normal(size=300).astype(np.float32)
    return pack(make_codec("innovation"), {"w": value}, HELD).memory


def chain(memory):
    return bytes(memory["chain/"]).hex()


def test_a_memory_comes_back_by_device_and_chain(tmp_path):
    first = Memories(tmp_path)
    for place in (first, Memories()):
        place.keep("d", "a" * 64, memory_of(1), version=0)
        place.keep("e", "b" * 64, memory_of(2), version=0)
    again = Memories(tmp_path)
    assert again.chain("d", "a" * 64) == chain(memory_of(1))
    found = again.find("d", chain(memory_of(1)))
    assert found["innovation/w"].tobytes() == memory_of(1)["innovation/w"].tobytes()
    assert again.find("e", chain(memory_of(1))) is None, "of another device"
    assert again.chain("d", None) == again.chain("d", "c" * 64) == ""


def test_a_damaged_memory_is_forgotten(tmp_path):
    Memories(tmp_path).keep("d", "a" * 64, memory_of(1), version=0)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = Memories(tmp_path)
    assert again.chain("d", "a" * 64) == ""
    assert again.find("d", chain(memory_of(1))) is None
    assert not [*tmp_path.iterdir()]


def test_a_sweep_leaves_the_last_of_each_device_and_so_many_in_all(tmp_path, monkeypatch):
    place = Memories(tmp_path)
    for number, device in enumerate("ddef"):
        place.keep(device, str(number) * 64, memory_of(number), version=number)
    place.sweep([("d", "1" * 64)])
    assert len([*tmp_path.iterdir()]) == 3
    assert place.chain("d", "1" * 64)
    monkeypatch.setattr(module, "DEVICES_MAX", 2)
    place.sweep([])
    assert not place.chain("d", "1" * 64), "the oldest goes"
    assert place.chain("e", "2" * 64)


def remembered(done):
    return len([*(done.aggregator.folder / "memories").iterdir()])


def test_innovations_come_close_in_any_order_and_cost_one_memory_a_device(tmp_path):
    runs = [world(tmp_path / str(seed), seed=seed, **SETTINGS).run() for seed in (0, 1)]
    first, other = (run.aggregator.version(3) for run in runs)
    assert first == other
    exact = load(in_process(FOUR, rounds=3, settings=settings_of()))
    np.testing.assert_allclose(load(first)["w"], exact["w"], atol=2e-3)
    assert remembered(runs[0]) == len(FOUR)


def test_later_updates_name_the_memory_that_the_offer_named(tmp_path):
    running = world(tmp_path, numbers=(0, 1), **SETTINGS)
    heard = []
    running.server.disturb = lambda topic, payload: heard.append((topic, payload)) or (payload,)
    running.run()
    told = [offer.memory for topic, offer in spoken(heard, Offer) if "device-0" in topic]
    first, second, third = dict.fromkeys(told)
    assert first == ""
    assert len(second) == len(third) == 64


def test_a_job_with_memories_survives_the_death_of_everyone(tmp_path):
    quiet = world(tmp_path / "quiet", **SETTINGS).run()
    running = world(tmp_path / "killed", **SETTINGS)
    running.die_together(14, 3, 5, 9, 4)
    running.run()
    assert running.aggregator.version(3) == quiet.aggregator.version(3)


def test_accepted_innovations_are_folded_again_after_a_restart(tmp_path):
    quiet = world(tmp_path / "quiet", numbers=(0, 1), **SETTINGS).run()
    running = world(tmp_path / "killed", numbers=(0, 1), **SETTINGS)
    running.run(until=lambda: running.aggregator.service.federation.version == 1)
    running.devices[1].kill()
    running.run(until=lambda: "train-2-device-0" in running.aggregator.ledger.past().accepted)
    running.aggregator.kill()
    running.aggregator.start(running.now)
    running.devices[1].start()
    running.run()
    assert running.devices[0].kinds().count("trained") == 3
    assert running.aggregator.version(3) == quiet.aggregator.version(3)


@pytest.mark.parametrize("who", ["device", "aggregator"])
def test_the_memory_of_one_side_lost_is_healed_by_a_whole_update(tmp_path, who):
    running = world(tmp_path, numbers=(0, 1), **SETTINGS)
    running.run(until=lambda: running.aggregator.service.federation.version == 2)
    running.aggregator.kill()
    running.devices[1].kill()
    folder = running.devices[1].folder if who == "device" else running.aggregator.folder / "memories"
    lost = [*folder.glob("memory-*" if who == "device" else "*.safetensors")]
    assert lost
    for file in lost:
        file.unlink()
    running.aggregator.start(running.now)
    running.devices[1].start()
    running.run()
    exact = load(in_process((0, 1), rounds=3, settings=settings_of()))
    np.testing.assert_allclose(load(running.aggregator.version(3))["w"], exact["w"], atol=5e-3)
    assert remembered(running) == 2


def test_a_memory_lost_while_a_device_trains_costs_a_second_training_and_no_round(tmp_path):
    running = world(tmp_path, numbers=(0, 1), **SETTINGS)
    running.run(until=lambda: running.devices[1].kinds().count("offer") == 2)
    assert "train-2-device-1" not in running.aggregator.ledger.past().accepted
    memories = running.aggregator.ledger.memories
    for file in (tmp_path / "aggregator" / "memories").iterdir():
        file.unlink()
    memories._kept.clear()
    memories._chains.clear()
    running.run()
    assert running.devices[1].kinds().count("trained") == 4
    assert "refused" not in running.devices[1].kinds()
    exact = load(in_process((0, 1), rounds=3, settings=settings_of()))
    np.testing.assert_allclose(load(running.aggregator.version(3))["w"], exact["w"], atol=5e-3)


def test_a_payload_with_another_memory_is_refused_and_one_without_is_taken():
    codec, value = make_codec("innovation"), first_value()
    other = pack(codec, value, HELD, memory=memory_of(1)).payload
    assert chain_named(other) == chain(memory_of(1))
    with pytest.raises(WireError, match="which is not the one kept here"):
        unpack(codec, other, HELD, memory=memory_of(2))
    with pytest.raises(WireError, match="which is not the one kept here"):
        unpack(codec, other, HELD)
    fresh = pack(codec, value, HELD)
    decoded = unpack(codec, fresh.payload, HELD, memory=memory_of(2))
    assert decoded.values["w"].tobytes() == fresh.conveyed["w"].tobytes()
    assert chain(decoded.memory) == chain(fresh.memory)


def first_value():
    return {"w": np.linspace(-1, 1, 300, dtype=np.float32)}
