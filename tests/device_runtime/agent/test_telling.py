"""What a device tells of its work, when, and that it tells nothing while nobody looks."""

from functools import partial
from itertools import pairwise

import pytest
from stage import NAME, Stage

from fleetune.device_runtime.agent.telling import LEAST_S
from fleetune.device_runtime.agent.vitals import Vitals
from fleetune.device_runtime.contracts.wire import DeviceStatus

VITALS = Vitals(memory_mb=103.5, temperature_c=51.0)


@pytest.fixture
def watched(tmp_path):
    stage = Stage(tmp_path, vitals=lambda: VITALS)
    stage.aggregator.status()
    stage.poll(3)
    stage.aggregator.heard()
    return stage


def statuses(stage, seconds):
    """Statuses within so many seconds, with when each came."""
    found, until = [], stage.now + seconds
    while stage.now < until:
        stage.now += 0.09
        stage.poll()
        found += [(stage.now, one) for one in stage.aggregator.heard(DeviceStatus)]
    return found


def test_nothing_is_told_while_nobody_looks_nor_of_a_device_whose_owner_keeps_it(watched, tmp_path):
    assert statuses(watched, 60) == []
    silent = Stage(tmp_path / "silent")
    silent.aggregator.status(tell_every_s=5.0)
    silent.poll(3)
    assert [one for one in silent.aggregator.heard(DeviceStatus) if one.phase] == []
    assert statuses(silent, 60) == []


def test_who_rests_tells_seldom_and_who_works_as_often_as_asked_and_at_moments_of_its_own(watched):
    watched.aggregator.status(tell_every_s=5.0)
    told = statuses(watched, 100)
    assert 5 <= len(told) <= 8
    assert {one.phase for _, one in told} == {"idle"}
    watched.aggregator.offer(1)
    told = statuses(watched, 100)
    gaps = {round(b - a, 3) for (a, _), (b, _) in pairwise(told)}
    assert min(gaps) > LEAST_S
    assert max(gaps) < 5.3
    assert len(gaps) > 3, "no beat that all devices have in common"
    assert {one.phase for _, one in told} <= {"training", "delivering"}, "nobody takes its update"


def test_what_it_tells(watched):
    watched.aggregator.status(tell_every_s=5.0)
    statuses(watched, 10)
    update = watched.trained(1, deadline_s=500.0)
    (_, told), *_ = statuses(watched, 5)
    assert (told.phase, told.round, told.memory_mb, told.temperature_c) == ("delivering", 1, 103.5, 51.0)
    assert 0 < told.mb_sent <= watched.device.link.bytes_sent / 1e6
    watched.aggregator.verdict(update, accepted=False, reason="it is not finite")
    *_, (_, told) = statuses(watched, 20)
    assert (told.phase, told.said) == ("idle", "round 1: refused: it is not finite")
    watched.aggregator.status(tell_every_s=0.0)
    assert statuses(watched, 60) == []


def test_steps_and_the_time_left_are_told_in_a_run(tmp_path):
    stage = Stage(tmp_path, vitals=lambda: VITALS)
    stage.aggregator.status(tell_every_s=5.0)
    stage.poll(3)
    stage.aggregator.offer(1, deadline_s=100.0)
    stage.device.agent._telling.due_at = float("inf")
    tell = partial(stage.device.agent._presence.tell_status, paused="")
    stage.until("offer")
    stage.aggregator.heard()
    tell(stage.now)
    (told,) = stage.aggregator.heard(DeviceStatus)
    assert (told.device_id, told.phase, told.step) == (NAME, "training", 1)
    assert 99 < told.left_s <= 100
    tell(stage.now + 100)
    assert stage.aggregator.heard(DeviceStatus)[-1].left_s < 0


def test_a_stranger_cannot_make_it_tell_more_often_than_every_few_seconds(watched):
    watched.aggregator.status(tell_every_s=1e-9)
    told = statuses(watched, 30)
    for every in (0.0, 1e-9, 0.0, 1e-9):
        watched.aggregator.status(tell_every_s=every)
        told += statuses(watched, 1)
    assert all(b - a >= 0.75 * LEAST_S for (a, _), (b, _) in pairwise(told))
