"""A job in which thresholds alone travel, and one in which nothing does: real LoRA, over the wire, through kills."""

import numpy as np
import pytest
from fleet import Aggregator, Device, World, settings_of
from words import write_lines

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.laws import check_settings
from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import parse_arrays, to_bytes
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.codecs.frame import read
from fleetune.device_runtime.contracts.thresholds import (
    blank_thresholds,
    parameters_of,
    pruned,
    thresholds_of,
)
from fleetune.device_runtime.contracts.wire import Offer
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.errors import ConfigError, WireError
from fleetune.device_runtime.network.loopback import Loopback

ROUNDS = 3
LR = 0.02


@pytest.fixture(scope="module")
def made(artifact, machine, tmp_path_factory):
    """Make a job of two devices, ready to run."""
    words = tmp_path_factory.mktemp("words")

    def workbench(number, starts):
        groups = (number % 3, (number + 1) % 3)
        path = write_lines(words / f"{number}.csv", seed=number, groups=groups)
        data = load_dataset(path, artifact.manifest, artifact.folder, seq_len=16)

        def start(work, adapter):
            starts.append((work.rounds_before, adapter))
            return machine.trainer(data, work, adapter)

        return Workbench(start, lambda work, adapter: machine.evaluate(data, adapter), data.num_samples)

    def make(mask, **changes):
        work = LocalWork(
            optimizer=OptimizerSpec(lr=LR), steps=4, batch_size=8, seq_len=16, mask=mask, held_out=0.2
        )
        folder, server, starts = tmp_path_factory.mktemp(mask), Loopback(), []
        fields = {"work": work, "rounds": ROUNDS, "clients": 2, "min_clients": 2, **changes}
        aggregator = Aggregator(
            server, folder, adapter=artifact.adapter(), artifact=artifact.digest, **fields
        ).start()
        first = FirstAdapter.of(artifact.adapter())
        devices = [
            Device(
                server, folder, n, workbench=workbench(n, starts), adapter=first, artifact=artifact.digest
            ).start()
            for n in (0, 1)
        ]
        running = World(server, aggregator, devices)
        running.accepted, running.offers, running.starts = [], [], starts
        watch(running)
        return running

    return make


def watch(running):
    accept, tell = running.aggregator.ledger.accept_all, running.aggregator.service._outbound.tell

    def kept(arrived):
        for update, content, _ in arrived:
            running.accepted.append((update, content))
        accept(arrived)

    def told(device_id, message):
        running.offers += [message] if isinstance(message, Offer) else []
        tell(device_id, message)

    running.aggregator.ledger.accept_all = kept
    running.aggregator.service._outbound.tell = told


@pytest.fixture(scope="module")
def straight(made):
    running = made("thresholds", down_codec="xor")
    running.run()
    return running


def version(running, number):
    return parse_arrays(running.aggregator.version(number))


def test_thresholds_alone_travel_and_are_averaged(straight, artifact):
    blank = blank_thresholds(artifact.adapter())
    assert blank
    for _, content in straight.accepted:
        _, shapes = read(content, bytes_max=10**6)
        assert shapes == {name: value.shape for name, value in blank.items()}
    last = version(straight, ROUNDS)
    assert to_bytes(parameters_of(last)) == to_bytes(artifact.adapter()), "no parameter left its device"
    assert all((value != 0).any() for value in thresholds_of(last).values())


def test_a_run_starts_from_the_averaged_thresholds_with_rows_of_its_own_gone_along(straight, artifact):
    rows = {}
    for number, adapter in straight.starts:
        wanted = thresholds_of(version(straight, number))
        assert to_bytes(thresholds_of(adapter)) == to_bytes(wanted)
        for name in wanted:
            rows.setdefault((number, name), set()).add(adapter[name.removesuffix(".threshold")].tobytes())
    assert {len(found) for (number, _), found in rows.items()} == {1, 2}
    assert all(len(found) == (2 if number else 1) for (number, _), found in rows.items())


def test_what_goes_down_is_a_difference_of_thresholds(straight, artifact):
    first = [offer for offer in straight.offers if offer.round == 1]
    assert {offer.adapter_sha256 for offer in first} == {first[0].adapter_sha256}
    assert not any(device.kinds().count("fetched") for device in straight.devices)
    later = [offer for offer in straight.offers if offer.round > 1 and offer.role == "train"]
    assert later
    assert all(offer.adapter.size_bytes < 600 for offer in later)
    assert straight.aggregator.ledger.cost(1).bytes_down == 0, "version 0 is made on the device"


def test_devices_keep_different_models_and_tell_what_they_are_worth(straight):
    for update, _ in straight.accepted:
        assert 0 <= update.stats["personal_accuracy"] <= 1
        assert update.stats["personal_loss"] < update.stats["global_loss"]
    kept = [
        parse_arrays(file.read_bytes())
        for device in straight.devices
        for file in sorted(device.folder.glob("personal-*"))[-1:]
    ]
    assert kept[0].keys() == kept[1].keys()
    assert any(kept[0][n].tobytes() != kept[1][n].tobytes() for n in parameters_of(kept[0]))


@pytest.mark.parametrize("mask", ["thresholds", "nothing"])
@pytest.mark.parametrize("seed", range(2))
def test_kills_anywhere_change_no_bit(made, mask, seed):
    wanted, running = made(mask, down_codec="xor"), made(mask, down_codec="xor")
    wanted.run()
    rng = np.random.default_rng(seed)
    for _ in range(12):
        for _ in range(int(rng.integers(1, 12))):
            running.turn()
        if running.aggregator.service.finished:
            break
        running.aggregator.kill()
        victim = running.devices[int(rng.integers(2))]
        victim.kill()
        running.aggregator.start(running.now)
        watch(running)
        victim.start()
    running.run()
    assert running.aggregator.version(ROUNDS) == wanted.aggregator.version(ROUNDS)
    assert kept_by(running) == kept_by(wanted)


def kept_by(running):
    files = [sorted(device.folder.glob("personal-*"))[-1] for device in running.devices]
    return [to_bytes(parse_arrays(file.read_bytes())) for file in files]


def test_nothing_travels_where_nothing_is_to(made, artifact):
    running = made("nothing")
    running.run()
    assert all(read(content, bytes_max=10**6)[1] == {} for _, content in running.accepted)
    assert running.aggregator.version(ROUNDS) == to_bytes(artifact.adapter())
    assert sum(running.aggregator.ledger.cost(n).bytes_down for n in range(ROUNDS + 1)) == 0
    assert all(update.stats["personal_loss"] < update.stats["global_loss"] for update, _ in running.accepted)


def test_strange_thresholds_are_refused_and_the_round_goes_on(made):
    running = made("thresholds")
    versions = running.aggregator.service._versions
    running.run(until=lambda: running.aggregator.service.federation.version == 1)
    task, held = running.aggregator.service.federation.rounds.task("device-0"), version(running, 1)
    name = next(iter(thresholds_of(held)))
    nan = encode_update("fp32", {name: np.ones_like(held[name])}, held)
    nan = nan.replace(np.float32(1).tobytes(), np.float32(np.nan).tobytes())
    other = {f"x.{name}": held[name]}
    of_parameters = {n: v for n, v in held.items() if n.endswith("lora_B.weight")}
    for content, said in (
        (nan, "NaN"),
        (encode_update("fp32", other, other), "unknown tensor"),
        (encode_update("fp32", of_parameters, held), "these tensors take at most"),
    ):
        with pytest.raises(WireError, match=said):
            versions.add(task, content, 10)
    running.run()
    assert running.aggregator.ledger.newest == ROUNDS


def test_an_adapter_is_written_without_thresholds_and_without_what_they_prune(artifact, tmp_path):
    from fleetune.device_runtime.contracts.adapters import load_peft, save_peft

    arrays = artifact.adapter()
    name, threshold = next(iter(blank_thresholds(arrays).items()))
    a = name.removesuffix(".threshold")
    threshold = np.where(np.arange(len(threshold)) == 0, np.float32(1e3), threshold)
    save_peft(tmp_path, artifact.manifest, {**arrays, name: threshold})
    found = load_peft(tmp_path, artifact.manifest)
    assert found.keys() == arrays.keys()
    assert not found[a][0].any()
    assert found[a][1:].tobytes() == arrays[a][1:].tobytes()
    assert pruned(arrays).keys() == arrays.keys()


@pytest.mark.parametrize(
    ("changes", "work", "said"),
    [
        ({"strategy": "fedavgm"}, {}, "strategy 'fedavgm' has no updates of parameters"),
        ({}, {"personal": 1}, "leave personal out"),
        ({}, {"frozen": "lora-a"}, "leave frozen out"),
        ({}, {"rows": 1}, "leave rows out"),
        ({"mask_every": 3}, {}, "are of mask 'consensus'"),
        ({}, {"codec": "innovation"}, "it remembers whole tensors"),
        ({}, {"mask": "treshold"}, "consensus, nothing, thresholds"),
    ],
)
def test_what_does_not_go_with_it_is_said(changes, work, said):
    settings = settings_of(work=LocalWork(**{"steps": 1, "mask": "thresholds", **work}), **changes)
    with pytest.raises(ConfigError, match=said):
        check_settings(settings, Patience(), num_layers=3)
