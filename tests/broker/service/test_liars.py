"""One device of three lies to a real service: what it said once owned the model, and does not any more."""

import logging

import numpy as np
import pytest
from fleet import Aggregator, Device, LinearTraining, Measure, World, in_process, points_of, settings_of

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.methods.heading import ELEMENTS_MIN
from fleetune.broker.rounds.quarantine import Quarantine
from fleetune.broker.store.rows import row
from fleetune.broker.tasks import AGAINST, FAR, LENGTH, REFUSED, WEIGHT
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import parse_arrays
from fleetune.device_runtime.network.loopback import Loopback

HONEST, SIZE, MANY = (0, 1), 50, ELEMENTS_MIN


class Lying(LinearTraining):
    """Trains as all do, and says something else."""

    def __init__(self, points, work, adapter, tell):
        self.begun, self.tell = adapter, tell
        super().__init__(points, work, adapter)

    @property
    def adapter(self):
        return self.tell(self.begun, self._adapter) if self.done else self._adapter

    @adapter.setter
    def adapter(self, value):
        self._adapter = value

    @property
    def done(self):
        return getattr(self, "step_index", 0) >= self.work.steps


def lying(tell, *, samples, size=SIZE):
    points = points_of(2, size)
    return Workbench(lambda work, adapter: Lying(points, work, adapter, tell), None, samples)


def zeros(before, made):
    return {name: np.zeros_like(value) for name, value in made.items()}


def filled(value):
    return lambda before, made: {name: np.full_like(array, value) for name, array in made.items()}


def times(factor):
    return lambda before, made: {
        n: (before[n] + factor * (v - before[n])).astype(np.float32) for n, v in made.items()
    }


def fleet_with(tmp_path, tell, *, samples=7, **changes):
    server = Loopback()
    changes = {"clients": 3, "min_clients": 3, "size": SIZE, "rounds": 2, "strikes": 0, **changes}
    aggregator = Aggregator(server, tmp_path, **changes).start()
    devices = [Device(server, tmp_path, n, size=SIZE).start() for n in HONEST]
    devices.append(Device(server, tmp_path, 2, size=SIZE, workbench=lying(tell, samples=samples)).start())
    return World(server, aggregator, devices)


def without_the_liar(rounds):
    return in_process(HONEST, rounds=rounds, settings=settings_of(), size=SIZE)


def kinds(aggregator):
    return [(mark.round, mark.device, mark.kind) for mark in aggregator.ledger.marks()]


@pytest.mark.parametrize(
    ("tell", "samples"), [(zeros, 2**29), (filled(1e6), 1), (times(100), 7), (filled(-1e6), 2**29)]
)
def test_what_is_far_off_is_left_out_to_the_bit(tmp_path, tell, samples, caplog):
    with caplog.at_level(logging.WARNING):
        done = fleet_with(tmp_path, tell, samples=samples).run()
    assert done.aggregator.version(2) == without_the_liar(2)
    assert kinds(done.aggregator) == [(1, "device-2", FAR), (2, "device-2", FAR)]
    assert "round 1: device-2: " in caplog.text
    assert row(done.aggregator.ledger, 1).held == 1


def test_without_bounds_the_same_devices_own_the_model(tmp_path):
    done = fleet_with(tmp_path, zeros, samples=2**29, weight_cap=0.0, length_cap=0.0).run()
    assert (
        max(np.abs(v).max() for n, v in parse_arrays(done.aggregator.version(1)).items() if n in "wb") < 1e-5
    )


def test_a_huge_weight_is_cut_to_three_times_the_middle_one(tmp_path):
    done = fleet_with(tmp_path, times(1), samples=2**29, rounds=1).run()
    cut = in_process((0, 1, 2), rounds=1, settings=settings_of(), size=SIZE, weights={2: 18})
    assert done.aggregator.version(1) == cut
    assert kinds(done.aggregator) == [(1, "device-2", WEIGHT)]
    assert done.aggregator.ledger.marks()[0].detail == "weighs 18; it told 536870912 samples"


def test_a_long_update_is_cut_to_five_times_the_middle_length(tmp_path):
    done = fleet_with(tmp_path, times(25), rounds=1).run()
    assert kinds(done.aggregator) == [(1, "device-2", LENGTH)]
    third = fleet_with(tmp_path / "other", times(25 * scale_of(done)), rounds=1).run()
    assert kinds(third.aggregator) == []
    made, same = (parse_arrays(one.aggregator.version(1)) for one in (done, third))
    assert all(np.allclose(made[n], same[n], rtol=1e-3, atol=1e-6) for n in made)


def scale_of(world):
    return 0.9999 * float(world.aggregator.ledger.marks()[0].detail.rpartition(" ")[2])


@pytest.mark.parametrize("strategy", ["median", "trimmed", "krum", "multi-krum"])
def test_robust_means_take_no_value_of_a_liar(tmp_path, strategy):
    done = fleet_with(tmp_path, filled(1e6), samples=2**29, strategy=strategy).run()
    assert np.abs(parse_arrays(done.aggregator.version(2))["w"]).max() < 10
    assert kinds(done.aggregator) == [(1, "device-2", FAR), (2, "device-2", FAR)]


def test_an_honest_fleet_is_not_touched(tmp_path):
    done = fleet_with(tmp_path, times(1), rounds=1).run()
    assert done.aggregator.version(1) == in_process((0, 1, 2), rounds=1, settings=settings_of(), size=SIZE)
    assert kinds(done.aggregator) == []


def test_a_job_that_needs_all_goes_on_without_the_one_that_sends_garbage(tmp_path):
    patience = Patience(deadline_s=100.0)
    done = fleet_with(tmp_path, filled(2.0**21), rounds=6, strikes=3, patience=patience).run(turns=20_000)
    refused = [number for number, _, kind in kinds(done.aggregator) if kind == REFUSED]
    assert refused == [1, 2, 3, 4], (
        "asked in 4 too: what is noted of a round tells from the second after it on"
    )
    assert done.aggregator.version(6) == without_the_liar(6)


@pytest.mark.parametrize("kills", [range(2, 400, 7), range(3, 400, 11), range(2, 400)])
def test_a_restart_gives_the_same_versions_and_the_same_quarantine(tmp_path, kills):
    calm = fleet_with(tmp_path / "calm", times(200), rounds=7, strikes=2).run(turns=20_000)
    hurt = fleet_with(tmp_path / "hurt", times(200), rounds=7, strikes=2).run_killed_at(set(kills))
    for version in range(8):
        assert hurt.aggregator.version(version) == calm.aggregator.version(version), version
    assert hurt.aggregator.ledger.marks() == calm.aggregator.ledger.marks()
    assert kinds(calm.aggregator) == [(n, "device-2", FAR) for n in (1, 2, 3)]
    assert Quarantine(2, calm.aggregator.ledger.marks()).until(7) == {"device-2": 23}
    shown = {one.device_id: one.left_out_until for one in hurt.aggregator.service.snapshot().devices}
    assert shown == {"device-0": 0, "device-1": 0, "device-2": 23}


def together(number, sign=1.0, size=MANY):
    """A device that goes where the others go, and a little its own way; or back."""
    own = np.random.default_rng(number).normal(1, 0.5, size).astype(np.float32)

    def tell(before, made):
        rows = {n: own[: v.size].reshape(v.shape) for n, v in made.items() if v.size <= size}
        return {n: (before[n] + np.float32(0.01 * sign) * rows[n]).astype(np.float32) for n in made}

    return lying(tell, samples=7, size=size)


def five(tmp_path, size=MANY, **changes):
    """A fleet of five, two of which go the other way, nearly three times as far."""
    server = Loopback()
    changes = {"clients": 5, "min_clients": 2, "size": size, "rounds": 6, "strikes": 2, **changes}
    aggregator = Aggregator(server, tmp_path, **changes).start()
    devices = [
        Device(server, tmp_path, n, size=size, workbench=together(n, -2.9 if n > 2 else 1.0, size)).start()
        for n in range(5)
    ]
    return World(server, aggregator, devices)


def test_two_of_five_that_go_back_are_left_out_and_not_asked_again_whoever_is_killed(tmp_path):
    calm = five(tmp_path / "calm").run(turns=20_000)
    assert kinds(calm.aggregator)[:4] == [(n, f"device-{d}", AGAINST) for n in (1, 2) for d in (3, 4)]
    assert {kind for _, _, kind in kinds(calm.aggregator)} == {AGAINST}
    assert Quarantine(2, calm.aggregator.ledger.marks()).until(6) == {"device-3": 23, "device-4": 23}
    assert row(calm.aggregator.ledger, 1).held == 2
    moved = parse_arrays(calm.aggregator.version(6))["w"] - parse_arrays(calm.aggregator.version(0))["w"]
    assert moved.mean() == pytest.approx(0.06, rel=0.1)
    hurt = five(tmp_path / "hurt").run_killed_at({*range(3, 400, 11)})
    assert [hurt.aggregator.version(n) for n in range(7)] == [calm.aggregator.version(n) for n in range(7)]
    assert hurt.aggregator.ledger.marks() == calm.aggregator.ledger.marks()


def test_of_few_numbers_nobodys_direction_is_looked_at(tmp_path):
    """In a fleet of 50 elements honest devices pull apart; a cosine of so many is chance."""
    calm = five(tmp_path, size=SIZE, rounds=2).run()
    assert AGAINST not in {kind for _, _, kind in kinds(calm.aggregator)}


def judge(number, loss, accuracy, samples):
    return Workbench(None, lambda work, adapter: Measure(loss, accuracy, samples), 5)


def test_a_lying_evaluator_weighs_no_more_than_three_times_the_middle_one(tmp_path):
    done = fleet_with(tmp_path, times(1), rounds=1)
    for name, bench in (
        ("j0", judge(0, 2.0, 0.5, 10)),
        ("j1", judge(1, 2.0, 0.5, 10)),
        ("liar", judge(2, 0.0, 1.0, 2**30)),
    ):
        device = Device(
            done.server, tmp_path, 0, name=name, role="evaluate", workbench=bench, size=SIZE
        ).start()
        device.turns = done.turns
        done.turns.join(device.link, device.agent)
    found = row(done.run().aggregator.ledger, 1)
    assert found.accuracy == pytest.approx((0.5 * 20 + 1.0 * 30) / 50)
    assert {d: m.accuracy for d, m in found.evaluations.items()} == {"j0": 0.5, "j1": 0.5, "liar": 1.0}
