from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.underway import Underway
from fleetune.toolkit.simulation.links import Line, TimedLink


def test_it_knows_what_has_not_arrived_yet():
    now = [0.0]
    link = TimedLink(Loopback().connect([]), Line(lambda _: (10.0, 10.0)), clock=lambda: now[0])
    underway = Underway(link)
    for name in ("one", "two"):
        link.publish("t", bytes(10))
        underway.add(name)
    assert (underway.has("one"), underway.has("two"), underway.has("three")) == (True, True, False)
    now[0] = 1.5
    link.move(1.5)
    assert (underway.has("one"), underway.has("two")) == (False, True)
    link.publish("t", bytes(10))
    underway.add("two")
    now[0] = 2.5
    link.move(2.5)
    assert underway.has("two"), "its second time"
    now[0] = 3.0
    link.move(3.0)
    assert not underway.has("two")


def test_it_sends_once_what_is_on_its_way_and_forgets_what_was_not_sent():
    link = TimedLink(Loopback().connect([]), Line(lambda _: (10.0, 10.0)), clock=lambda: 0.0)
    underway, sent = Underway(link), []

    def send():
        link.publish("t", bytes(10))
        sent.append("one")
        return True

    assert not underway.once("one", lambda: False), "there was no connection"
    assert [underway.once("one", send) for _ in range(3)] == [True, False, False]
    assert sent == ["one"]
