"""Lazy devices: what a skip costs, that it counts as the last update did, and that no death changes what comes of it."""

from itertools import pairwise

import numpy as np
import pytest
from fleet import FOUR, STEPS, settings_of, world
from safetensors.numpy import load

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.laws import check_settings
from fleetune.broker.methods.lazy import WINDOW, move2, moved2
from fleetune.broker.store.rows import rows
from fleetune.device_runtime.contracts.codecs import is_repeat, make_codec, pack
from fleetune.device_runtime.contracts.codecs.codec import of_kind
from fleetune.device_runtime.contracts.codecs.innovation import SKIPS_MAX, repeating
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, WireError

ROUNDS = 8
WORK = LocalWork(steps=STEPS, codec="innovation", codec_bits=6)
ALWAYS = 1e9
"""A threshold at which every update is skipped that may be."""


def lazy_world(folder, *, lazy=ALWAYS, rounds=ROUNDS, **changes):
    running = world(folder, work=WORK, rounds=rounds, lazy=lazy, **changes)
    running.accepted = []
    accept = running.aggregator.ledger.accept_all

    def kept(arrived):
        for update, content, _ in arrived:
            running.accepted.append((update.round, update.device_id, content))
        accept(arrived)

    running.aggregator.ledger.accept_all = kept
    return running


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return lazy_world(tmp_path_factory.mktemp("straight")).run()


def test_the_window_by_hand():
    assert moved2([4.0, 2.0, 3.0], 0.5) == 0.5 * 4 + 0.25 * 2 + 0.5 / 3 * 3
    assert moved2([1.0] * 99, 1.0) == pytest.approx(sum(1 / d for d in range(1, WINDOW + 1)))
    assert moved2([], 0.8) == 0.0
    assert (
        move2({"a": np.float32([3]), "b": np.float32([1, 1])}, {"a": np.float32([1]), "b": np.zeros(2)}) == 6
    )


def test_a_skip_is_tiny_and_is_counted_in_the_history(straight):
    skips = [(number, content) for number, _, content in straight.accepted if is_repeat(content)]
    assert {number for number, _ in skips} == set(range(2, ROUNDS + 1)), "the first update is always sent"
    assert all(len(content) < 160 for _, content in skips)
    told = [row.skipped for row in rows(straight.aggregator.ledger)]
    assert told == [0, 0, *[len(FOUR)] * (ROUNDS - 1)]
    assert straight.devices[0].kinds().count("trained") == ROUNDS


def test_a_skip_counts_as_the_last_update_did(straight):
    """All skip: the model moves on by the mean that it was moved by in round 1."""
    versions = [load(straight.aggregator.version(number))["w"] for number in range(ROUNDS + 1)]
    first = versions[1] - versions[0]
    assert np.abs(first).max() > 1e-4
    for old, new in pairwise(versions):
        np.testing.assert_allclose(new - old, first, rtol=0, atol=3e-7)


def test_a_threshold_of_nothing_sends_every_update(tmp_path):
    running = lazy_world(tmp_path, lazy=0.0, rounds=3).run()
    assert not any(is_repeat(content) for *_, content in running.accepted)
    assert b"moves" not in running.aggregator.ledger.strategy_state(3)


def test_a_threshold_between_skips_some(tmp_path):
    running = lazy_world(tmp_path, lazy=0.8).run()
    skipped = sum(is_repeat(content) for *_, content in running.accepted)
    assert 0 < skipped < ROUNDS * len(FOUR)


def test_skips_in_a_row_are_bounded(tmp_path):
    running = lazy_world(tmp_path, rounds=SKIPS_MAX + 3, numbers=(0, 1)).run()
    told = [row.skipped for row in rows(running.aggregator.ledger)]
    assert told == [0, 0, *[2] * SKIPS_MAX, 0, 2]


@pytest.mark.parametrize("down_codec", ["full", "xor"])
@pytest.mark.parametrize("seed", range(3))
def test_kills_anywhere_change_no_bit_and_no_skip(tmp_path, down_codec, seed):
    wanted = lazy_world(tmp_path / "whole", lazy=0.8, down_codec=down_codec).run()
    running = lazy_world(tmp_path / "killed", lazy=0.8, down_codec=down_codec)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        for _ in range(int(rng.integers(1, 40))):
            running.turn()
        if running.aggregator.service.finished:
            break
        running.aggregator.kill()
        victim = running.devices[int(rng.integers(len(FOUR)))]
        victim.kill()
        running.aggregator.start(running.now)
        victim.start()
    running.run()
    assert running.aggregator.version(ROUNDS) == wanted.aggregator.version(ROUNDS)
    told = [[row.skipped for row in rows(one.aggregator.ledger)] for one in (running, wanted)]
    assert told[0] == told[1]
    assert any(told[0])


@pytest.mark.parametrize("who", ["device", "aggregator"])
def test_who_is_not_remembered_sends(tmp_path, who):
    running = lazy_world(tmp_path, numbers=(0, 1), rounds=4)
    running.run(until=lambda: running.aggregator.service.federation.version == 2)
    running.aggregator.kill()
    running.devices[1].kill()
    folder = running.devices[1].folder if who == "device" else running.aggregator.folder / "memories"
    for file in folder.glob("memory-*" if who == "device" else "*.safetensors"):
        file.unlink()
    running.aggregator.start(running.now)
    running.devices[1].start()
    running.run()
    told = [row.skipped for row in rows(running.aggregator.ledger)]
    assert told[2] == told[4] == 2
    assert told[3] == (1 if who == "device" else 0)


def test_a_skip_that_nobody_asked_for_is_refused_and_the_round_goes_on(tmp_path):
    running = lazy_world(tmp_path, lazy=0.0, rounds=3, numbers=(0, 1))
    versions = running.aggregator.service._versions
    running.run(until=lambda: running.aggregator.service.federation.version == 1)
    memories, last = running.aggregator.ledger.memories, running.aggregator.ledger.last_update("device-0")
    memory = memories.find("device-0", memories.chain("device-0", last))
    codec, held = make_codec("innovation", 0.0, 6), versions.reference(1)
    known = {name: held[name] for name in of_kind("innovation", memory)}
    forged = pack(repeating(codec), known, held, memory=memory).payload
    task = running.aggregator.service.federation.rounds.task("device-0")
    with pytest.raises(WireError, match="nobody asked for"):
        versions.add(task, forged, 10)
    running.run()
    assert running.aggregator.ledger.newest == 3


@pytest.mark.parametrize("lazy", [float("nan"), -1.0, 1e300])
def test_a_threshold_that_cannot_be_is_refused(lazy):
    with pytest.raises(ConfigError, match="lazy"):
        check_settings(settings_of(work=WORK, lazy=lazy), Patience(), num_layers=1)


def test_a_codec_without_memory_is_no_codec_of_the_lazy():
    with pytest.raises(ConfigError, match="codec 'int8' remembers no update; 'innovation' does"):
        check_settings(settings_of(work=LocalWork(steps=1, codec="int8"), lazy=0.8), Patience(), num_layers=1)
