"""What is told of a fleet, from messages by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    DeviceStatus,
    RoundFigures,
    View,
    aggregator_topic,
    device_topic,
    encode,
)
from fleetune.toolkit.watching.fleet import Fleet

JOB = "home"
WORK = {"phase": "training", "round": 2, "step": 10, "steps": 40, "step_s": 0.5, "left_s": 60.0}


class Heard:
    """A fleet that is told things, at a clock by hand."""

    def __init__(self):
        self.fleet, self.now = Fleet(JOB), 100.0
        self.say(aggregator_topic(JOB), self.status())

    def say(self, topic, message):
        self.fleet.take(topic, encode(message), self.now)

    def status(self, **changes):
        fields = {"job": JOB, "session": "s", "online": True, "round": 2, "version": 1, "tell_every_s": 5.0}
        return AggregatorStatus(**{**fields, **changes})

    def device(self, name, **fields):
        fields = {"online": True, **fields}
        self.say(device_topic(JOB, name, "status"), DeviceStatus(device_id=name, **fields))

    def view(self, **fields):
        known = {"job": JOB, "session": "s", "round": 2, "num_rounds": 9, "version": 1, "is_open": True}
        self.say(aggregator_topic(JOB, "view"), View(**{**known, **fields}))

    def states(self):
        return {device.device_id: device.state for device in self.fleet.state(self.now).devices}

    def why(self, name):
        return next(d.why for d in self.fleet.state(self.now).devices if d.device_id == name)


@pytest.fixture
def heard():
    return Heard()


def test_each_state_and_its_reason(heard):
    for name in ("a", "b", "c"):
        heard.device(name, **WORK)
    heard.device("gone", **{**WORK, "session": "x"})
    heard.device("gone", online=False, session="x")
    heard.device("hot", **{**WORK, "paused": "temperature 90.0 C is above 70 C"})
    heard.device("late", **{**WORK, "left_s": 10.0})
    heard.device("over", **{**WORK, "left_s": -3.0})
    heard.device("slow", **{**WORK, "step_s": 1.9})
    heard.device("odd", phase="idle", said="round 1: refused: not finite")
    heard.device("old")
    heard.device("barred", phase="idle")
    heard.view(left_out={"barred": 7})
    assert heard.states() == {
        "a": "training", "b": "training", "c": "training", "gone": "gone", "hot": "paused", "late": "late",
        "over": "late", "slow": "slow", "odd": "refused", "old": "online", "barred": "left out",
    }  # fmt: skip
    assert heard.why("hot") == "temperature 90.0 C is above 70 C"
    assert heard.why("late") == "round 2 closes in 10 s"
    assert heard.why("over") == "round 2 is over"
    assert heard.why("slow") == "1.9 s a step; the median is 0.5 s"
    assert heard.why("odd") == "round 1: refused: not finite"
    assert heard.why("barred") == "not asked until round 7"
    gone = next(d for d in heard.fleet.state(heard.now).devices if d.device_id == "gone")
    assert (gone.phase, gone.step) == ("training", 10), "what it was at stays to be seen"


def test_who_stops_telling_is_silent_and_no_sooner_than_its_steps_allow(heard):
    heard.device("stopped", **{**WORK, "left_s": 0.0})
    heard.device("long", **{**WORK, "left_s": 0.0, "step_s": 30.0})
    heard.device("idle", phase="idle")
    heard.now += 17
    assert heard.states() == {"stopped": "silent", "long": "training", "idle": "idle"}
    assert heard.why("stopped") == "nothing heard for 17 s"


def test_nobody_is_silent_while_nobody_looks(heard):
    heard.device("a", **{**WORK, "left_s": 0.0})
    heard.say(aggregator_topic(JOB), heard.status(tell_every_s=0.0))
    heard.now += 1000
    assert heard.states() == {"a": "training"}


def test_a_device_is_named_by_its_topic_alone(heard):
    status = encode(DeviceStatus(device_id="b", online=True))
    heard.fleet.take(device_topic(JOB, "a", "status"), status, heard.now)
    heard.fleet.take(
        device_topic(JOB, "<b>", "status"), encode(DeviceStatus(device_id="<b>", online=True)), 1
    )
    assert heard.states() == {}
    heard.device("a")
    heard.fleet.take(device_topic(JOB, "a", "status"), b"", heard.now)
    assert heard.states() == {}, "its status was cleared"


def test_figures_come_in_parts_and_of_a_job_that_began_anew_the_old_ones_go(heard):
    figures = [RoundFigures(round=n, devices=1, measured={"loss": 1.0 / (n + 1)}) for n in range(300)]
    heard.view(version=300, figures=figures[:256])
    assert (heard.fleet.rounds_from, heard.fleet.lacks_rounds) == (256, True)
    heard.view(version=300, figures=figures[256:])
    assert (heard.fleet.rounds_from, heard.fleet.lacks_rounds) == (300, False)
    heard.view(version=0, figures=figures[:1])
    assert [one.round for one in heard.fleet.state(0).rounds] == [0]


def test_an_aggregator_that_is_away_is_not_shown_by_what_it_said(heard):
    heard.view(num_pending=3)
    assert heard.fleet.state(heard.now).job.num_pending == 3
    heard.say(aggregator_topic(JOB), heard.status(online=False, round=0, version=0))
    job = heard.fleet.state(heard.now).job
    assert (job.aggregator, job.round, job.num_rounds, job.num_pending) == ("away", 2, 9, 0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["device/a/status", "aggregator/status", "aggregator/view", "x"]), st.binary()
        )
    )
)
def test_nothing_that_comes_raises(messages):
    fleet = Fleet(JOB)
    for leaf, payload in messages:
        fleet.take(f"fleetune/v1/{JOB}/{leaf}", payload, 0.0)
    fleet.state(1.0)
