"""Sums under masks from end to end: real agents, service and ledger; to the bit what the same numbers give without masks."""

from collections import Counter

import msgspec
import numpy as np
import pytest
from fleet import Aggregator, Device, LinearTraining, World, first_adapter, points_of, roughly, spoken

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.work import device_seed
from fleetune.broker.rounds.masked_round import KEYS, REVEALS, SHARES, UPDATES
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.device_runtime.arrays import parse_arrays
from fleetune.device_runtime.contracts.mask_messages import (
    MaskAsk,
    MaskGroup,
    MaskInbox,
    MaskKeys,
    MaskReveal,
    MaskShare,
    MaskShares,
)
from fleetune.device_runtime.contracts.secure_sums.grid import added, mean_change, placed, weight_of
from fleetune.device_runtime.contracts.wire import Chunk, Decline, Offer, UpdateReady, decode, encode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.terms.terms import Terms

SIZE = 40
QUICK = Patience(deadline_s=100.0, secure_s=10.0, gather_s=5.0)


def fleet(folder, numbers=(0, 1, 2, 3), **changes):
    """A job of small devices, with what is said on the wire."""
    log = []

    def listening(topic, payload):
        log.append((topic, payload))
        return disturb(topic, payload)

    disturb = changes.pop("disturb", None) or (lambda topic, payload: (payload,))
    terms, seed = changes.pop("terms", None), changes.pop("seed_of_turns", 0)
    server = Loopback(disturb=listening)
    fields = {"rounds": 1, "clients": len(numbers), "min_clients": 3, "secure": "masks", "secure_range": 0.01}
    fields |= changes
    aggregator = Aggregator(
        server, folder, size=SIZE, patience=fields.pop("patience", QUICK), **fields
    ).start()
    devices = [Device(server, folder, n, size=SIZE, terms=terms).start() for n in numbers]
    found = World(server, aggregator, devices, seed=seed)
    found.log = log
    return found


def masks_of(found):
    service = found.aggregator.service
    return service.federation.rounds.masks if service else None


def at_phase(found, phase):
    return lambda: masks_of(found) is not None and masks_of(found).phase == phase


def expected(settings, numbers, *, number=1, position_of=None):
    """Version 1 from the numbers of these devices, added in one place."""
    reference = first_adapter(SIZE)
    total = np.zeros(SIZE + 1 + 6 + 1, np.uint64)
    for device in numbers:
        seed = device_seed(
            settings.seed, round_number=number, position=(position_of or {}).get(device, device)
        )
        work = LocalWork(steps=settings.work.steps, seed=seed)
        training = LinearTraining(points_of(device, SIZE), work, {n: v.copy() for n, v in reference.items()})
        while not training.done:
            training.step()
        weight = weight_of(settings.grid, len(training.points[0]))
        added(
            total,
            placed(training.adapter, reference, settings.grid, weight=weight, seed=seed).numbers,
            settings.grid,
        )
    change = mean_change(total, reference, settings.grid, num_devices=len(numbers))
    return {n: (np.float64(r) + change[n]).astype(np.float32) for n, r in reference.items()}


def assert_is(found, wanted, version=1):
    made = parse_arrays(found.aggregator.version(version))
    assert {n: v.tobytes() for n, v in made.items()} == {n: v.tobytes() for n, v in wanted.items()}


@pytest.mark.parametrize("count", [3, 4, 7, 10])
@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm"])
def test_the_same_bits_with_masks_as_without(tmp_path, count, strategy):
    made = {}
    for how in ("masks", "grid"):
        found = fleet(
            tmp_path / how, range(count), secure=how, rounds=2, strategy=strategy, seed_of_turns=count
        ).run()
        made[how] = [found.aggregator.version(v) for v in (1, 2)]
    assert made["masks"] == made["grid"]


def test_what_is_summed_is_what_the_devices_learned(tmp_path):
    found = fleet(tmp_path).run()
    assert_is(found, expected(found.aggregator.settings, range(4)))
    moved = parse_arrays(found.aggregator.version(1))["w"] - first_adapter(SIZE)["w"]
    assert np.abs(moved).max() > 1e-5


def test_few_neighbours_give_the_same_bits(tmp_path):
    found = fleet(tmp_path, range(9), secure_neighbours=4).run()
    assert_is(found, expected(found.aggregator.settings, range(9)))
    groups = spoken(found.log, MaskInbox)
    assert {len(message.shares) for _, message in groups} == {4}


def test_devices_that_start_from_replicas_move_the_version_as_far(tmp_path):
    made = {}
    for how in ("masks", "grid"):
        found = fleet(tmp_path / how, secure=how, rounds=3, down_codec="int8").run()
        made[how] = found.aggregator.version(3)
        assert any(not message.is_exact for _, message in spoken(found.log, Offer))
    assert made["masks"] == made["grid"]


def test_a_simulation_s_store_does_as_well(tmp_path):
    found = fleet(tmp_path, in_memory=True).run()
    assert isinstance(found.aggregator.ledger, MemoryStore)
    assert_is(found, expected(found.aggregator.settings, range(4)))


@pytest.mark.parametrize("seed", range(3))
def test_a_rough_network_gives_the_sum_of_whole_updates(tmp_path, seed):
    """A key that came damaged costs an attempt."""
    found = fleet(
        tmp_path, disturb=roughly(seed), seed_of_turns=seed, patience=Patience(deadline_s=1e4, secure_s=2e3)
    )
    found.run(turns=20_000)
    assert_is(found, expected(found.aggregator.settings, range(4), position_of=positions_of(found)))


@pytest.mark.parametrize("phase", [KEYS, SHARES, UPDATES, REVEALS])
def test_a_device_that_drops_out_in_any_phase_costs_its_own_update_at_most(tmp_path, phase):
    found = fleet(tmp_path, range(6))
    if phase == KEYS:
        found.devices[5].kill()
        found.run(until=lambda: found.aggregator.service.federation.rounds.open_round is not None)
    else:
        found.run(until=at_phase(found, phase))
        found.devices[5].kill()
    found.devices.pop()
    found.run()
    there = range(6 if phase == REVEALS else 5)
    assert_is(found, expected(found.aggregator.settings, there))
    asks = [message for _, message in spoken(found.log, MaskAsk)]
    assert any(ask.dropped for ask in asks) == (phase == UPDATES)


def test_two_of_ten_that_drop_out_after_their_shares_are_taken_out_of_the_sum(tmp_path):
    found = fleet(tmp_path, range(10), min_clients=7)
    found.run(until=at_phase(found, UPDATES))
    for device in found.devices[8:]:
        device.kill()
    del found.devices[8:]
    assert_is(found.run(), expected(found.aggregator.settings, range(8)))


def test_a_fifth_of_forty_with_few_neighbours_may_drop_out(tmp_path):
    numbers = range(40)
    found = fleet(tmp_path, numbers, min_clients=30, secure_neighbours=20, in_memory=True)
    found.run(until=at_phase(found, UPDATES))
    for device in found.devices[32:]:
        device.kill()
    del found.devices[32:]
    found.run()
    names = sorted(f"device-{number}" for number in numbers)
    position_of = {number: names.index(f"device-{number}") for number in numbers}
    assert_is(found, expected(found.aggregator.settings, range(32), position_of=position_of))


def test_a_device_that_declines_after_its_shares_is_taken_out_of_the_sum(tmp_path):
    found = fleet(tmp_path, range(5))
    found.run(until=at_phase(found, UPDATES))
    device = found.devices[4]
    found.aggregator.service.take(
        device.identity.up,
        encode(Decline(device_id=device.name, job="job", task_id="train-1-device-4", round=1, reason="no")),
        found.now,
    )
    device.kill()
    found.devices.pop()
    assert_is(found.run(), expected(found.aggregator.settings, range(4)))


def test_a_round_whose_masks_cannot_be_taken_off_begins_anew(tmp_path):
    """Of five only two answer, three shares are needed: nothing is summed until all take part in another attempt."""
    mute = {f"fleetune/v1/job/device/device-{n}/up" for n in (2, 3, 4)}
    found = fleet(tmp_path, range(5), disturb=lambda t, p: () if t in mute and _is(p, MaskReveal) else (p,))
    found.run(until=lambda: at_phase(found, KEYS)() and masks_of(found).group == "1-5")
    assert found.aggregator.ledger.newest == 0
    assert found.aggregator.ledger.past().first == 5
    mute.clear()
    found.aggregator.kill()
    found.aggregator.start(found.now)
    found.run()
    assert_is(found, expected(found.aggregator.settings, range(5), position_of=positions_of(found)))
    tasks = {message.task_id for _, message in spoken(found.log, UpdateReady)}
    assert len(tasks) == 10
    assert len(found.aggregator.ledger.figures(1).trained) == 5
    assert found.aggregator.ledger.figures(0).trained == []
    groups = {message.group for _, message in spoken(found.log, MaskAsk)}
    assert groups == {"1-0", "1-5"}


def positions_of(found):
    """Position of each device's task that counts, by number."""
    offers = [message for _, message in spoken(found.log, Offer)]
    return {
        int(o.task_id.split("-")[3]): int(o.task_id.split("-")[4])
        for o in offers
        if o.task_id.count("-") == 4
    }


def test_too_many_failed_sums_end_the_job_with_a_word(tmp_path):
    patience = Patience(deadline_s=10.0, secure_s=5.0, gather_s=1.0, extensions_max=1)
    found = fleet(
        tmp_path, range(4), patience=patience, disturb=lambda t, p: () if _is(p, MaskReveal) else (p,)
    )
    with pytest.raises(TransportError, match="sums under masks failed; the same command resumes"):
        found.run()


def test_wrong_shares_of_one_device_are_seen_and_left_out(tmp_path):
    def disturb(topic, payload):
        if "device-4" in topic and _is(payload, MaskReveal):
            message = decode(payload)
            lies = [MaskShare(place=s.place, data=b"\1" * 33) for s in message.seeds]
            return (encode(msgspec.structs.replace(message, seeds=lies)),)
        return (payload,)

    found = fleet(tmp_path, range(6), disturb=disturb)
    assert_is(found.run(), expected(found.aggregator.settings, range(6)))


def test_garbage_from_one_device_is_told_and_moves_nothing(tmp_path, caplog):
    found = fleet(tmp_path)
    found.run(until=at_phase(found, UPDATES))
    masking = found.devices[2].agent._assignments.masking
    masking.mask = lambda numbers, grid: numbers.__iadd__(np.uint64(7 << 20))
    found.run()
    assert found.aggregator.version(1) == found.aggregator.version(0)
    assert "round 1: its sum is left out, the version stays as it was: implausible sum" in caplog.text


def test_one_device_that_lies_moves_the_mean_no_further_than_the_range(tmp_path):
    """As docs/privacy.md has it: the range is all that binds it."""
    found = fleet(tmp_path)
    found.run(until=at_phase(found, UPDATES))
    masking, grid = found.devices[2].agent._assignments.masking, found.aggregator.settings.grid
    mask, total = masking.mask, sum(5 + number for number in range(4))

    def lie(numbers, grid):
        numbers[1] = 0.9 * total * 2 ** (grid.bits - 1)
        mask(numbers, grid)

    masking.mask = lie
    found.run()
    moved = parse_arrays(found.aggregator.version(1))["never_trained"] - 1
    assert np.abs(moved).max() == pytest.approx(0.9 * grid.limit, rel=1e-3)


# Kills


class Killed(BaseException):
    """Nobody who is killed has the time to handle it."""


class Axe:
    """Kills whoever publishes the n-th message, just before it is out: what was to be durable by then is."""

    def __init__(self, strike, whose):
        self.strike, self.whose, self.count, self.phase, self.found = strike, whose, 0, None, None

    def __call__(self, topic, payload):
        self.count += topic.endswith(self.whose)
        if self.count == self.strike:
            self.count += 1
            self.phase = masks_of(self.found).phase if masks_of(self.found) else ""
            raise Killed
        return (payload,)


def run_under(axe, folder):
    """A job whose victim is killed where the axe strikes, and started again."""
    axe.found = found = fleet(folder, disturb=axe)
    victim = found.aggregator if axe.whose == "/down" else found.devices[1]
    while not (found.aggregator.service and found.aggregator.service.finished):
        try:
            found.run()
        except Killed:
            victim.kill()
            victim.start(*([found.now] if victim is found.aggregator else []))
    return found


@pytest.mark.parametrize("whose", ["/down", "device-1/up"])
def test_whoever_is_killed_before_any_message_the_bits_are_the_same(tmp_path, whose):
    wanted = expected(fleet(tmp_path / "whole").aggregator.settings, range(4))
    phases, strike = Counter(), 0
    while True:
        strike += 1
        axe = Axe(strike, whose)
        found = run_under(axe, tmp_path / str(strike))
        assert_is(found, wanted)
        if axe.phase is None:
            break
        phases[axe.phase] += 1
    assert phases.keys() >= {KEYS, SHARES, UPDATES, REVEALS}, phases


def test_both_killed_again_and_again_give_the_same_bits(tmp_path):
    found = fleet(tmp_path, rounds=2)
    plain = fleet(tmp_path / "grid", rounds=2, secure="grid").run()
    found.die_together(3, 7, 11, 13, 5)
    found.run()
    assert found.aggregator.version(2) == plain.aggregator.version(2)


def test_a_round_that_lost_too_many_before_their_shares_begins_anew_after_the_grace(tmp_path):
    """Of five two have answered, three shares are needed, and three devices died: nobody waits for the deadline."""
    mute = {f"fleetune/v1/job/device/device-{n}/up" for n in (2, 3, 4)}
    patience = Patience(deadline_s=0, secure_s=10.0, gather_s=5.0, grace_s=7.0)
    found = fleet(
        tmp_path,
        range(5),
        disturb=lambda t, p: () if t in mute and _is(p, MaskReveal) else (p,),
        patience=patience,
    )
    found.run(until=at_phase(found, REVEALS))
    found.devices[2].kill()
    found.run(until=lambda: found.now > 30.0)
    assert masks_of(found).group == "1-0", "one that is gone may be done without"
    died_at = found.now
    for device in found.devices[3:]:
        device.kill()
    del found.devices[2:]
    found.run(until=lambda: masks_of(found).group != "1-0")
    assert found.now == died_at + 7.0


def test_a_device_is_asked_the_same_after_the_aggregator_was_killed(tmp_path):
    found = fleet(tmp_path, disturb=lambda t, p: () if _is(p, MaskReveal) and not reveal else (p,))
    reveal = []
    found.run(until=at_phase(found, REVEALS))
    for _ in range(3):
        found.turn()
    found.aggregator.kill()
    found.aggregator.start(found.now)
    reveal.append(True)
    found.run()
    asks = {}
    for topic, message in spoken(found.log, MaskAsk):
        asks.setdefault(topic, set()).add((tuple(message.delivered), tuple(message.dropped)))
    assert all(len(one) == 1 for one in asks.values())
    assert_is(found, expected(found.aggregator.settings, range(4)))


# What the aggregator sees


def test_nothing_that_the_aggregator_holds_gives_a_single_update(tmp_path):
    """Its view of a device: the masked payload. Over many runs with one and the same update each of its bits is a coin."""
    payloads, others = [], []
    for i in range(40):
        found = fleet(tmp_path / str(i)).run()
        content = {}
        for topic, chunk in spoken(found.log, Chunk):
            content.setdefault(topic, {})[chunk.sha256] = chunk.data
        uploads = list(content["fleetune/v1/job/device/device-2/up"].values())
        payloads.append(uploads[-1])
        others.append(found.aggregator.version(1))
    assert len(set(others)) == 1
    assert len(set(payloads)) == 40
    bits = np.unpackbits(np.frombuffer(b"".join(payloads), np.uint8).reshape(40, -1), axis=1)
    assert abs(bits.mean() - 0.5) < 0.02
    assert bits.mean(axis=0).min() > 0.05
    assert bits.mean(axis=0).max() < 0.95


def test_the_aggregator_is_told_no_figure_of_one_device_and_keeps_masked_numbers_alone(tmp_path):
    found = fleet(tmp_path, range(5))
    found.run(until=at_phase(found, REVEALS))
    for _, update in spoken(found.log, UpdateReady):
        assert update.codec == "masked"
        assert update.stats.keys() <= {"seconds", "fetch_seconds"}
    held = [payload for *_, payload in found.aggregator.ledger.accepted()]
    settings = found.aggregator.settings
    for device in range(5):
        seed = device_seed(settings.seed, round_number=1, position=device)
        training = LinearTraining(points_of(device, SIZE), LocalWork(steps=4, seed=seed), first_adapter(SIZE))
        while not training.done:
            training.step()
        weight = weight_of(settings.grid, len(training.points[0]))
        plain = placed(training.adapter, first_adapter(SIZE), settings.grid, weight=weight, seed=seed).numbers
        assert all(plain.astype("<u8").tobytes()[:5] not in payload for payload in held)
    reveals = [message for _, message in spoken(found.log, MaskReveal)]
    sealed = {s.data for _, message in spoken(found.log, MaskShares) for s in message.shares}
    assert not any(share.data in text for m in reveals for share in m.seeds for text in sealed)


def test_when_the_round_is_closed_nothing_of_its_masks_is_kept(tmp_path):
    found = fleet(tmp_path).run()
    for _ in range(3):
        found.turn()
    past = found.aggregator.ledger.past()
    assert past.notes == ()
    for device in found.devices:
        assert device.files.read("masks.bin") is None


def test_no_device_is_ever_asked_for_both_kinds_of_share_of_another(tmp_path):
    found = fleet(tmp_path, range(6))
    found.run(until=at_phase(found, UPDATES))
    found.devices.pop().kill()
    found.run()
    for _, message in spoken(found.log, MaskReveal):
        seeds, secrets = ({s.place for s in told} for told in (message.seeds, message.secrets))
        assert not seeds & secrets


# The contract


def test_an_owner_who_allows_masked_training_alone_declines_the_rest(tmp_path):
    terms = Terms(least_batch=0, least_samples=0, least_effective=0, secure_only=True)
    assert_is(
        fleet(tmp_path, terms=terms).run(), expected(fleet(tmp_path / "x").aggregator.settings, range(4))
    )
    found = fleet(tmp_path / "grid", terms=terms, secure="grid")
    with pytest.raises(
        ConfigError, match=r"declined by device-0, device-1, device-2, device-3: .*secure_only"
    ):
        found.run()
    declines = [message.reason for _, message in spoken(found.log, Decline)]
    assert len(declines) == 4
    assert all("secure_only: the update would not be masked" in reason for reason in declines)


def _is(payload, kind):
    return isinstance(decode(payload), kind)


def test_keys_are_told_again_until_there_is_a_group(tmp_path):
    lost = []

    def disturb(topic, payload):
        if _is(payload, MaskKeys) and len(lost) < 3:
            lost.append(topic)
            return ()
        return (payload,)

    found = fleet(tmp_path, disturb=disturb, patience=Patience(secure_s=300.0))
    assert_is(found.run(), expected(found.aggregator.settings, range(4)))
    assert len(lost) == 3


@pytest.mark.parametrize("field", ["mask_key", "share_key"])
@pytest.mark.parametrize("kind", ["small", "copied"])
def test_a_device_whose_keys_are_none_is_left_out_and_stops_nobody(tmp_path, kind, field):
    """A key of small order, or another device's, would have the others refuse the group."""

    def disturb(topic, payload):
        if "device-4/up" in topic and _is(payload, MaskKeys):
            theirs = [message.mask_key for _, message in spoken(found.log[:-1], MaskKeys)]
            changes = {field: bytes(32) if kind == "small" else theirs[0]}
            return (encode(msgspec.structs.replace(decode(payload), **changes)),)
        return (payload,)

    found = fleet(tmp_path, range(5), disturb=disturb, seed_of_turns=3)
    found.run()
    assert_is(found, expected(found.aggregator.settings, range(4)))
    groups = [message for _, message in spoken(found.log, MaskGroup)]
    assert {len(group.peers) for group in groups} == {3}


def test_whose_shares_do_not_fit_is_named(tmp_path, caplog):
    def disturb(topic, payload):
        if "device-1/up" in topic and _is(payload, MaskKeys):
            return (encode(msgspec.structs.replace(decode(payload), seed_digest=bytes(32))),)
        return (payload,)

    found = fleet(
        tmp_path, range(4), disturb=disturb, patience=msgspec.structs.replace(QUICK, extensions_max=0)
    )
    with pytest.raises(TransportError, match="sums under masks failed"):
        found.run()
    found = fleet(
        tmp_path / "more",
        range(4),
        disturb=disturb,
        patience=msgspec.structs.replace(QUICK, extensions_max=1),
    )
    with pytest.raises(TransportError, match="sums under masks failed"):
        found.run()
    assert "the shares of device-1 do not fit their keys; it begins anew" in caplog.text
