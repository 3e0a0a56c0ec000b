"""When an agent has to be polled: nothing happens before ``due_at`` without a message, and something does at it."""

from math import inf

import pytest
from fleet import JOB
from stage import HOT, ON_CELLULAR, Stage, shifted

from fleetune.device_runtime.agent.assignments import DEADLINE_GRACE_S
from fleetune.device_runtime.agent.deliveries import REPEAT_S, SERVED_S
from fleetune.device_runtime.agent.presence import HELLO_S
from fleetune.device_runtime.contracts.wire import Finished
from fleetune.device_runtime.rules.gate import Gate
from fleetune.device_runtime.rules.rules import Network, Rules, Temperature

PERIOD_S = 7.0


def idle(stage, weather):
    return HELLO_S


def fetching(stage, weather):
    stage.aggregator.offer(2, adapter=shifted())
    return 3 * REPEAT_S


def announcing(stage, weather):
    stage.trained()
    return REPEAT_S


def served(stage, weather):
    update = stage.trained()
    stage.pull(update)
    return SERVED_S


def hot(stage, weather):
    weather.reading = HOT
    stage.now += PERIOD_S
    stage.poll()
    stage.aggregator.offer(deadline_s=3.0)
    return PERIOD_S


def hot_and_nearly_overdue(stage, weather):
    weather.reading = HOT
    stage.now += PERIOD_S
    stage.poll()
    stage.aggregator.offer(deadline_s=0.5)
    return 0.5 + DEADLINE_GRACE_S


def on_cellular(stage, weather):
    stage.trained()
    weather.reading = ON_CELLULAR
    stage.now += PERIOD_S
    stage.poll()
    stage.aggregator.offer(2, adapter=shifted())
    return PERIOD_S


def gate_of(weather):
    rules = Rules(temperature=Temperature(max_c=70), network=Network(), period_s=PERIOD_S, resume_after_s=0)
    return Gate(rules, lambda: weather.reads.append(1) or weather.reading)


def seen(stage, weather):
    """All that shows that an agent did something."""
    return stage.device.link.bytes_sent, len(stage.device.events), len(weather.reads)


ANYWAY = (idle, fetching, announcing, served)
BY_RULES = (*ANYWAY, hot, hot_and_nearly_overdue, on_cellular)


@pytest.mark.parametrize(
    ("situation", "has_rules"), [*((s, False) for s in ANYWAY), *((s, True) for s in BY_RULES)]
)
def test_nothing_happens_before_it_is_due_and_something_does_then(tmp_path, weather, situation, has_rules):
    weather.reads = []
    stage = Stage(tmp_path, gate=gate_of(weather) if has_rules else None)
    agent = stage.device.agent
    assert agent.due_at(0.0) <= 0.0, "it has to say hello"
    stage.poll()
    longest_s = situation(stage, weather)
    stage.poll(3)
    due_at = agent.due_at(stage.now)
    assert stage.now < due_at <= stage.now + longest_s
    before = seen(stage, weather)
    for share in (0.1, 0.5, 0.999):
        assert agent.poll(stage.now + share * (due_at - stage.now)) is False
    assert (seen(stage, weather), agent.due_at(due_at)) == (before, due_at)
    agent.poll(due_at)
    assert seen(stage, weather) != before
    assert agent.due_at(due_at) > due_at


def test_work_is_due_at_once_until_it_is_done_and_so_is_what_came_of_it(stage):
    stage.poll()
    stage.aggregator.offer()
    stage.poll()
    agent = stage.device.agent
    while "trained" not in stage.device.kinds():
        assert agent.due_at(stage.now) <= stage.now
        stage.poll()
    assert agent.due_at(stage.now) <= stage.now, "no nap before it is announced"
    stage.poll()
    assert stage.now + 0.75 * REPEAT_S <= agent.due_at(stage.now) <= stage.now + REPEAT_S


def test_a_reconnection_is_due_at_once(stage):
    stage.poll()
    stage.server.restart()
    assert stage.device.agent.due_at(stage.now) <= stage.now


def test_who_works_without_rules_and_who_has_finished_wait_for_nothing(careful, weather):
    careful.poll()
    careful.aggregator.say(Finished(job=JOB))
    careful.poll()
    assert careful.device.agent.due_at(careful.now) == inf


def test_a_paused_device_is_asked_again_soon_whatever_its_period(careful, weather):
    """A period of 0 is for steps; one who sleeps need not look all the time."""
    weather.reading = HOT
    careful.poll()
    assert careful.now < careful.device.agent.due_at(careful.now) <= careful.now + 0.1
