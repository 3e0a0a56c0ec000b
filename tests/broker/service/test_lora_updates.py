"""Devices that train a part of a LoRA, over the wire: what they send, what is refused, and what comes of it."""

from itertools import count

import msgspec
import numpy as np
import pytest
from flat import train
from fleet import Aggregator, Device, World, settings_of
from words import write_lines

from fleetune.broker.methods.configurators import CONFIGURATORS
from fleetune.broker.service.versions import Versions
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.tasks import Task
from fleetune.device_runtime.agent.codec_memory import put_back, taken
from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import parse_arrays
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.codecs.frame import read
from fleetune.device_runtime.contracts.lora import cut, drawn_rows, pairs_of, place_of, trained_part
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.errors import ConfigError, WireError
from fleetune.device_runtime.network.loopback import Loopback

A, B = (f"base_model.model.blocks.0.dense.lora_{side}.weight" for side in "AB")
ROUNDS = 3
WORK = LocalWork(optimizer=OptimizerSpec(lr=0.02), steps=4, batch_size=8, seq_len=16)


@pytest.fixture
def federate(artifact, machine, tmp_path):
    """Run three rounds of two devices; the aggregator when they are done, and what it accepted."""
    runs = count()

    def run(strategy="fedavg", *, configurator="fixed", numbers=(0, 1), **changes):
        folder = tmp_path / f"run-{next(runs)}"

        def workbench(number):
            groups = (number % 3, (number + 1) % 3)
            path = write_lines(tmp_path / f"{number}.csv", seed=number, groups=groups)
            data = load_dataset(path, artifact.manifest, artifact.folder, seq_len=WORK.seq_len)
            start = lambda work, adapter: machine.trainer(data, work, adapter)  # noqa: E731
            return Workbench(start, lambda work, adapter: machine.evaluate(data, adapter), data.num_samples)

        server, start = Loopback(), artifact.adapter()
        given = {"rounds": ROUNDS, "clients": len(numbers), "min_clients": len(numbers)}
        given |= {"artifact": artifact.digest, "strategy": strategy, "configurator": configurator}
        work = msgspec.structs.replace(WORK, **changes)
        aggregator = Aggregator(server, folder, adapter=start, work=work, **given).start()
        accepted = []
        accept = aggregator.ledger.accept_all
        aggregator.ledger.accept_all = lambda arrived: (
            accepted.extend(one.payload for one in arrived),
            accept(arrived),
        )[1]
        own = {"artifact": artifact.digest, "adapter": FirstAdapter.of(start)}
        devices = [Device(server, folder, n, workbench=workbench(n), **own).start() for n in numbers]
        World(server, aggregator, devices).run()
        return aggregator, accepted

    return run


def names_and_shapes(payload):
    return read(payload, bytes_max=10**6)[1]


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "xor"])
def test_an_a_that_is_frozen_never_travels_and_never_changes(artifact, federate, codec):
    whole = sum(map(len, federate(codec=codec)[1]))
    aggregator, accepted = federate(codec=codec, frozen="lora-a")
    pairs, start = pairs_of(artifact.adapter()), artifact.adapter()
    made = parse_arrays(aggregator.version(ROUNDS))
    for pair in pairs:
        assert made[pair.a].tobytes() == start[pair.a].tobytes()
        assert made[pair.b].tobytes() != start[pair.b].tobytes()
        assert all(pair.a not in names_and_shapes(payload) for payload in accepted)
    assert len(accepted) == 2 * ROUNDS
    assert sum(map(len, accepted)) < 0.8 * whole


@pytest.mark.parametrize(
    ("codec", "ratio"), [("fp32", 0.0), ("fp16", 0.0), ("int8", 0.0), ("topk", 0.3), ("xor", 0.0)]
)
@pytest.mark.parametrize("strategy", ["product", "hetlora", "rank-mean"])
def test_of_each_pair_the_components_of_the_rank_travel(artifact, federate, codec, ratio, strategy):
    aggregator, accepted = federate(strategy, codec=codec, codec_ratio=ratio, rank=2)
    made, start = parse_arrays(aggregator.version(ROUNDS)), artifact.adapter()
    for pair in pairs_of(start):
        shapes = [names_and_shapes(payload) for payload in accepted]
        assert {found[pair.a] for found in shapes} == {(2, 16)}
        assert {found[pair.b] for found in shapes} == {(16, 2)}
        if strategy != "product":
            assert made[pair.a][2:].tobytes() == start[pair.a][2:].tobytes()
            assert made[pair.b][:, 2:].tobytes() == start[pair.b][:, 2:].tobytes()
        assert (made[pair.b][:, :2] != start[pair.b][:, :2]).any()


def test_half_of_the_components_are_half_of_their_bytes(artifact, federate):
    sizes = {rank: len(federate("rank-mean", rank=rank)[1][0]) for rank in (2, 4)}
    pairs = sum(artifact.adapter()[name].nbytes for pair in pairs_of(artifact.adapter()) for name in pair)
    assert sizes[4] - sizes[2] == pytest.approx(pairs / 2, abs=64)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("strategy", ["product", "hetlora", "rank-mean"])
def test_rows_drawn_for_a_round_travel_alone_and_all_others_stay(artifact, federate, codec, strategy):
    """Two devices, three rounds: what no round has drawn is to the bit as it was at the start."""
    aggregator, accepted = federate(strategy, codec=codec, rows=1)
    start, made = artifact.adapter(), parse_arrays(aggregator.version(ROUNDS))
    assert len(accepted) == 2 * ROUNDS
    works = [decided.task.work for decided in aggregator.ledger.decided()]
    assert {work.rows_seed for work in works} == {aggregator.settings.seed}
    drawn = [drawn_rows(start, work) for work in works]
    for pair in pairs_of(start):
        assert {names_and_shapes(payload)[pair.a] for payload in accepted} == {(1, 16)}
        assert {names_and_shapes(payload)[pair.b] for payload in accepted} == {(16, 1)}
        if strategy != "product":
            still = np.setdiff1d(np.arange(4), [rows[pair.a][0] for rows in drawn])
            assert len(still)
            assert made[pair.a][still].tobytes() == start[pair.a][still].tobytes()
            assert made[pair.b][:, still].tobytes() == start[pair.b][:, still].tobytes()
        assert (made[pair.b] != start[pair.b]).any()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_are_their_share_of_the_bytes_exactly(artifact, federate, rows):
    """Of fp32 each value is four bytes, and what frames it is the same but for a shape's and a length's own digits."""
    start = artifact.adapter()
    (sent, *_) = federate("rank-mean", rows=rows)[1]
    sizes = {name: len(part) for name, part in read(sent, bytes_max=10**6)[0].parts.items()}
    for pair in pairs_of(start):
        for name in pair:
            assert sizes[name] * 4 == start[name].nbytes * rows
    heads = {name for name in start if not any(name in pair for pair in pairs_of(start))}
    assert all(sizes[name] == start[name].nbytes for name in heads)


def test_what_a_codec_owes_of_rows_waits_until_they_are_drawn_again():
    owed = np.arange(1.0, 13.0).reshape(4, 3)
    whole, rows = {A: np.zeros((4, 3), np.float32)}, {A: np.array([1, 3])}
    rows = {A: place_of(A, rows[A])}
    part = taken({f"residual/{A}": owed}, whole, rows)
    assert part[f"residual/{A}"].tolist() == owed[[1, 3]].tolist()
    back = put_back({f"residual/{A}": 10 * owed[[1, 3]]}, {f"residual/{A}": owed}, whole, rows)
    assert back[f"residual/{A}"].tolist() == (owed * [[1], [10], [1], [10]]).tolist()
    settled = put_back({}, {f"residual/{A}": owed}, whole, rows)
    assert settled[f"residual/{A}"].tolist() == (owed * [[1], [0], [1], [0]]).tolist()
    bits = {A: owed > 6}
    assert taken({f"residual/{A}": owed}, whole, bits)[f"residual/{A}"].tolist() == list(range(7, 13))
    back = put_back({f"residual/{A}": np.full(6, 0.5)}, {f"residual/{A}": owed}, whole, bits)
    assert back[f"residual/{A}"].tolist() == np.where(owed > 6, 0.5, owed).tolist()
    assert put_back({}, {}, whole, rows) == {}, "a tensor of which nothing is owed is not kept"
    assert taken({f"residual/{A}": settled[f"residual/{A}"]}, whole, rows) == {}


def test_devices_of_unequal_ranks_make_one_version(federate):
    """Drawn by their ids."""
    _, accepted = federate("hetlora", configurator="ranks", rank=4, numbers=range(6))
    ranks = {names_and_shapes(payload)[A][0] for payload in accepted}
    assert len(ranks) > 1
    assert ranks <= {1, 2, 4}


def test_what_a_codec_owes_of_another_rank_or_of_a_frozen_tensor_waits(artifact, federate, monkeypatch):
    """A configurator that changes rank and frozen part from round to round."""
    parts = [{"rank": 4}, {"rank": 2}, {"frozen": "lora-a", "rank": 4}]
    fixed = CONFIGURATORS["fixed"]()

    def choose(state, candidate):
        choice = fixed.choose(state, candidate)
        return choice._replace(work=msgspec.structs.replace(choice.work, **parts[candidate.round - 1]))

    monkeypatch.setitem(CONFIGURATORS, "fixed", lambda: fixed._replace(choose=choose))
    _, accepted = federate("rank-mean", codec="int8", rank=4)
    assert len(accepted) == 2 * ROUNDS
    assert [names_and_shapes(payload).get(A) for payload in accepted[::2]] == [(4, 16), (2, 16), None]


@pytest.mark.parametrize(
    ("part", "names", "rank", "said"),
    [
        ({"frozen": "lora-a"}, [A], 0, "lora_A.weight': unknown tensor"),
        ({"rank": 2}, [A], 0, r"lora_A.weight: shape \[4, 16\], expected \[2, 16\]"),
        ({"rank": 2}, [A, B], 1, r"lora_B.weight: shape \[16, 1\], expected \[16, 2\]"),
        ({"frozen": "lora-a"}, None, 0, "these tensors take at most"),
        ({"rows": 1}, [A], 2, r"lora_A.weight: shape \[2, 16\], expected \[1, 16\]"),
    ],
)
def test_a_payload_of_another_part_is_refused(artifact, part, names, rank, said):
    work, start = msgspec.structs.replace(WORK, **part), artifact.adapter()
    versions = Versions(MemoryStore(), settings_of(work=work, strategy="rank-mean"), start)
    task = Task("t", "d", "train", 1, 0, 0, work)
    sent = {name: value for name, value in cut(start, rank).items() if names is None or name in names}
    with pytest.raises(WireError, match=said):
        versions.add(task, encode_update("fp32", sent, cut(start, rank)), 10)
    versions.add(task, encode_update("fp32", trained_part(start, work), trained_part(start, work)), 10)


def test_an_update_can_be_no_larger_than_its_part(artifact):
    start = artifact.adapter()
    versions = Versions(MemoryStore(), settings_of(strategy="rank-mean"), start)
    sizes = [
        versions.update_bytes_max(Task("t", "d", "train", 1, 0, 0, msgspec.structs.replace(WORK, **part)))
        for part in ({}, {"rank": 2}, {"rank": 2, "frozen": "lora-a"})
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_a_local_run_of_a_part_refuses_an_artifact_without_lora(word_artifact, word_file, tmp_path):
    with pytest.raises(ConfigError, match="rank 2: the artifact has no LoRA pairs"):
        train(word_artifact, data=word_file, out=tmp_path / "run", rank=2)


@pytest.mark.parametrize(
    ("strategy", "part"),
    [
        ("fedavg", {}),
        ("fedavg", {"frozen": "lora-a"}),
        ("fedavg", {"policy": PolicySpec(name="head")}),
        ("product", {}),
        ("product", {"rank": 2}),
        ("hetlora", {"rank": 2}),
        ("rank-mean", {"rank": 2}),
    ],
    ids=str,
)
def test_every_baseline_learns(artifact, machine, federate, tmp_path, strategy, part):
    aggregator, _ = federate(strategy, steps=12, numbers=(0, 1, 2), **part)
    path = write_lines(tmp_path / "all.csv", seed=9)
    data = load_dataset(path, artifact.manifest, artifact.folder, seq_len=WORK.seq_len)
    before = machine.evaluate(data, artifact.adapter())
    after = machine.evaluate(data, parse_arrays(aggregator.version(ROUNDS)))
    assert after.loss < 0.9 * before.loss
