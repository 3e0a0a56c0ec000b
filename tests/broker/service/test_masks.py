"""A job whose devices agree on a mask: what travels up and down, to the byte, and what a kill changes: nothing."""

import math

import msgspec
import numpy as np
import pytest
from fleet import FOUR, STEPS, roughly, world

from fleetune.device_runtime.arrays import parse_arrays
from fleetune.device_runtime.contracts.codecs.frame import read
from fleetune.device_runtime.contracts.masks import mask_bytes
from fleetune.device_runtime.contracts.wire import Offer
from fleetune.device_runtime.contracts.work import LocalWork

SIZE = 3000
COUNT = SIZE + 1 + 6
SHARE = 0.1
KEPT = math.ceil(SHARE * COUNT)
ROUNDS = 6
EVERY = 4
"""Rounds 1 and 5 vote; 2, 3, 4 and 6 are masked."""


def masked_world(folder, *, codec="fp32", ratio=0.0, **changes):
    work = LocalWork(steps=STEPS, codec=codec, codec_ratio=ratio, mask="consensus")
    job = {"work": work, "rounds": ROUNDS, "mask_share": SHARE, "mask_every": EVERY, **changes}
    running = world(folder, **job)
    running.accepted, running.offers = [], []
    watch(running)
    return running


def watch(running):
    accept, tell = running.aggregator.ledger.accept_all, running.aggregator.service._outbound.tell

    def told(device_id, message):
        if isinstance(message, Offer):
            running.offers.append((device_id, message))
        tell(device_id, message)

    def kept(arrived):
        for update, content, _ in arrived:
            running.accepted.append((update.round, content))
        accept(arrived)

    running.aggregator.ledger.accept_all = kept
    running.aggregator.service._outbound.tell = told


def version(running, number):
    return parse_arrays(running.aggregator.version(number))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return masked_world(tmp_path_factory.mktemp("straight")).run()


def changed(running, number):
    old, new = version(running, number - 1), version(running, number)
    return sum(int(np.count_nonzero(old[name] != new[name])) for name in old)


def test_between_votes_the_share_travels_exactly_and_nothing_else_changes(straight):
    """Of fp32: four bytes an element."""
    sizes = {number: set() for number in range(1, ROUNDS + 1)}
    for number, content in straight.accepted:
        sizes[number].add(sum(map(len, read(content, bytes_max=10**6)[0].parts.values())))
    whole = 4 * (SIZE + 1)
    assert sizes == {1: {whole}, 5: {whole}, **{key: {4 * KEPT} for key in (2, 3, 4, 6)}}
    assert [changed(straight, number) <= KEPT for number in range(1, ROUNDS + 1)] == [
        number not in (1, 5) for number in range(1, ROUNDS + 1)
    ]


def test_a_mask_goes_down_once_to_each_device_and_is_named_after_that(straight):
    told = {(device, o.round): (o.mask_bytes, o.mask_sha256[:8]) for device, o in straight.offers}
    masks = {number: {told[device, number][1] for device in told_devices(straight)} for number in range(1, 7)}
    assert masks[1] == masks[5] == {""}
    assert masks[2] == masks[3] == masks[4]
    assert masks[2] != masks[6]
    size = mask_bytes(version(straight, 0))
    assert size == (COUNT + 7) // 8
    for device in told_devices(straight):
        assert [told[device, number][0] for number in range(1, 7)] == [0, size, 0, 0, 0, size]


def told_devices(running):
    return sorted({device for device, _ in running.offers})


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "safari", "own-last"])
def test_a_strategy_does_not_learn_of_a_mask(tmp_path, strategy):
    running = masked_world(tmp_path, strategy=strategy, rounds=3).run()
    if strategy != "fedavgm":  # its momentum goes on where nothing travels
        assert changed(running, 3) <= KEPT
    state = running.aggregator.ledger.strategy_state(3)
    assert " mask" in parse_arrays(state)


@pytest.mark.parametrize(("codec", "ratio"), [("fp16", 0.0), ("int8", 0.0), ("topk", 0.5), ("xor", 0.0)])
def test_every_codec_packs_what_the_mask_leaves_and_pays_later_what_it_owes(tmp_path, codec, ratio):
    running = masked_world(tmp_path, codec=codec, ratio=ratio).run()
    assert len(running.accepted) == ROUNDS * len(FOUR)
    masks = [c for number, c in running.accepted if number in (2, 3, 4, 6)]
    assert {
        sum(math.prod(shape) for shape in read(content, bytes_max=10**6)[1].values()) for content in masks
    } == {KEPT}
    assert all(changed(running, number) <= KEPT for number in (2, 3, 4, 6))


@pytest.mark.parametrize("down_codec", ["full", "xor", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_kills_and_losses_anywhere_change_no_bit(tmp_path, down_codec, seed):
    wanted = masked_world(tmp_path / "whole", down_codec=down_codec).run()
    running = masked_world(tmp_path / "killed", down_codec=down_codec, disturb=roughly(seed))
    rng = np.random.default_rng(seed)
    for _ in range(6):
        for _ in range(int(rng.integers(20, 90))):
            running.turn()
        if running.aggregator.service.finished:
            break
        running.aggregator.kill()
        running.aggregator.start(running.now)
        watch(running)
        device = running.devices[int(rng.integers(len(FOUR)))]
        device.kill()
        device.start()
    running.run()
    if down_codec == "int8":  # who holds what, and so which replica, depends on what was lost on the way
        assert all(changed(running, number) <= KEPT for number in (2, 3, 4, 6))
    else:
        assert running.aggregator.version(ROUNDS) == wanted.aggregator.version(ROUNDS)


def test_a_device_that_lost_its_mask_asks_for_it_again(tmp_path, straight):
    running = masked_world(tmp_path)
    running.run(until=lambda: running.aggregator.service.federation.round == 3)
    running.devices[0].files.delete("mask.bin")
    running.run()
    assert running.aggregator.version(ROUNDS) == straight.aggregator.version(ROUNDS)
    mine = [o.mask_bytes for device, o in running.offers if device == "device-0" and o.round in (3, 4)]
    assert any(mine)


def forging(service, **changes):
    """Have a service change what it offers device-1 together with a mask."""
    tell = service._outbound.tell

    def forged(device_id, message):
        if isinstance(message, Offer) and message.mask_bytes and device_id == "device-1":
            message = msgspec.structs.replace(message, **changes)
        tell(device_id, message)

    service._outbound.tell = forged
    return service


def test_a_mask_that_is_not_what_the_offer_names_is_declined(tmp_path):
    running = masked_world(tmp_path, min_clients=3)
    service = forging(running.aggregator.service, mask_sha256="0" * 64)
    running.run(until=lambda: service.federation.round == 3)
    said = [event.text for event in running.devices[1].events if event.kind == "declined"]
    assert said
    assert said[0].startswith("mask: SHA-256 of what was sent is not '0000")


def test_a_mask_of_a_strange_size_is_declined_before_a_byte_is_pulled(tmp_path):
    running = masked_world(tmp_path, min_clients=3)
    service = forging(running.aggregator.service, mask_bytes=2**30)
    running.run(until=lambda: service.federation.round == 3)
    said = [event.text for event in running.devices[1].events if event.kind == "declined"]
    assert said
    assert said[0] == f"mask of {2**30} bytes; this adapter's has {(COUNT + 7) // 8}"


def test_a_job_without_a_mask_says_nothing_of_one(tmp_path):
    running = world(tmp_path, rounds=1)
    running.offers, running.accepted = [], []
    watch(running)
    running.run()
    assert {(o.mask_sha256, o.mask_bytes) for _, o in running.offers} <= {("", 0)}
