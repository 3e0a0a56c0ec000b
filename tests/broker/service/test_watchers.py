"""What an aggregator does for who looks: an answer, a word to its devices, and nothing at all while nobody does."""

from fleet import JOB, Aggregator, Device, World

from fleetune.broker.service.watchers import STATUSES_A_SECOND, TELL_S, tell_every_s
from fleetune.device_runtime.agent.vitals import Vitals
from fleetune.device_runtime.contracts.wire import (
    LOOK_S,
    AggregatorStatus,
    DeviceStatus,
    Look,
    View,
    aggregator_topic,
    decode,
    device_topic,
    encode,
)
from fleetune.device_runtime.network.loopback import Loopback


class Watched:
    """A job of four devices in memory, and who may watch it."""

    def __init__(self, folder, **changes):
        self.server = Loopback()
        aggregator = Aggregator(self.server, folder, in_memory=True, **changes).start()
        devices = [Device(self.server, None, n, vitals=Vitals).start() for n in range(4)]
        self.world = World(self.server, aggregator, devices)
        topics = [aggregator_topic(JOB), aggregator_topic(JOB, "view"), device_topic(JOB, "+", "status")]
        self.link = self.server.connect(topics)

    def look(self, rounds_from=0):
        self.link.publish(aggregator_topic(JOB, "look"), encode(Look(rounds_from=rounds_from)))

    def heard(self, kind):
        found = []
        while (message := self.link.receive(0)) is not None:
            found.append(decode(message[1]))
        return [one for one in found if isinstance(one, kind)]

    def run_for(self, seconds):
        until = self.world.now + seconds
        self.world.run(until=lambda: self.world.now >= until)


def test_nobody_looks_and_nothing_is_said(tmp_path):
    watched = Watched(tmp_path)
    watched.world.run()
    heard = watched.heard((View, DeviceStatus, AggregatorStatus))
    assert [one for one in heard if isinstance(one, View)] == []
    assert {one.phase for one in heard if isinstance(one, DeviceStatus)} == {""}
    assert {one.tell_every_s for one in heard if isinstance(one, AggregatorStatus)} == {0.0}


def test_who_looks_is_answered_and_devices_tell_for_a_minute_more(tmp_path):
    watched = Watched(tmp_path, clients=5, min_clients=5)  # it waits for one more device for ever
    watched.run_for(1)
    watched.heard(object)
    watched.look()
    watched.run_for(30)
    heard = watched.heard((View, DeviceStatus, AggregatorStatus))
    (view,) = [one for one in heard if isinstance(one, View)]
    assert (view.job, view.round, view.num_rounds, view.is_open) == (JOB, 0, 3, False)
    assert [one.tell_every_s for one in heard if isinstance(one, AggregatorStatus)] == [TELL_S]
    told = [one for one in heard if isinstance(one, DeviceStatus)]
    assert {(one.device_id, one.phase) for one in told} == {(f"device-{n}", "idle") for n in range(4)}
    assert len(told) < 4 * 4, "who rests tells a quarter as often"
    watched.run_for(LOOK_S)
    assert watched.heard(AggregatorStatus)[-1].tell_every_s == 0.0
    watched.run_for(300)
    assert watched.heard(DeviceStatus) == []


def test_figures_of_rounds_and_where_devices_stand(tmp_path):
    watched = Watched(tmp_path, rounds=3)
    service = watched.world.aggregator.service
    watched.world.run(until=lambda: service.federation.version == 2 and service.federation.rounds.open_round)
    watched.heard(object)
    watched.look(rounds_from=1)
    watched.world.turn()
    while not (views := watched.heard(View)):
        watched.world.turn()
    view = views[0]
    assert [(one.round, one.devices) for one in view.figures][:1] == [(1, 4)]
    assert set(view.figures[0].measured) == {"train_loss"}
    assert view.num_pending + view.num_accepted == 4
    assert set(view.pending) <= {f"device-{n}" for n in range(4)}


def test_many_looks_are_one_answer_a_second(tmp_path):
    watched = Watched(tmp_path, clients=5, min_clients=5)
    watched.run_for(1)
    watched.heard(object)
    for _ in range(50):
        watched.look(rounds_from=7)
    watched.look(rounds_from=0)
    watched.run_for(3)
    assert len(watched.heard(View)) == 2


def test_a_larger_fleet_tells_less_often():
    for number in (1, 75, 76, 1_000, 10_000, 100_000):
        every_s = tell_every_s(number)
        assert number / every_s <= STATUSES_A_SECOND
        assert every_s == TELL_S or number / (every_s / 2) > STATUSES_A_SECOND
    assert (tell_every_s(1), tell_every_s(75), tell_every_s(1_000)) == (5.0, 5.0, 80.0)


def test_what_is_no_look_on_its_topic_is_left_out(tmp_path):
    watched = Watched(tmp_path)
    status = AggregatorStatus(job=JOB, session="", online=False, round=0, version=0)
    watched.link.publish(aggregator_topic(JOB, "look"), encode(status))
    watched.link.publish(aggregator_topic(JOB, "look"), b"\xc1")
    watched.world.run()
    assert watched.heard(View) == []
