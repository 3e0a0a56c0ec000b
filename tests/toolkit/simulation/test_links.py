"""Times of messages on a virtual link, by hand."""

from math import inf

from fleetune.device_runtime.network.loopback import Loopback
from fleetune.toolkit.simulation.links import Line, TimedLink


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def linked(line):
    server, clock = Loopback(), Clock()
    device = TimedLink(server.connect(["down"]), line, clock=clock)
    return server, clock, device, server.connect(["up"])


def test_messages_queue_for_the_line_and_then_take_the_latency():
    server, clock, device, _ = linked(Line(lambda _: (100.0, 10.0), latency_s=0.5))
    server.publish("down", b"x" * 200, retain=False)
    server.publish("down", b"y" * 100, retain=False)
    device.move(0.0)
    assert device.due_at == 2.5
    clock.now = 2.5
    assert device.has_mail(2.5)
    assert device.receive(0) == ("down", b"x" * 200)
    assert device.receive(0) is None
    assert device.due_at == 3.5
    assert device.bytes_received == 200


def test_what_a_device_sends_arrives_after_its_bytes_at_the_rate_up():
    _, clock, device, aggregator = linked(Line(lambda _: (inf, 10.0), latency_s=0.5))
    clock.now = 1.0
    device.publish("up", b"z" * 20)
    device.move(3.4)
    assert not aggregator.inbox
    device.move(3.5)
    assert list(aggregator.inbox) == [("up", b"z" * 20)]
    assert device.bytes_sent == 20


def test_the_rate_is_that_of_the_time_at_which_the_first_byte_leaves():
    *_, device, _ = linked(Line(lambda t: (1.0, 10.0 if t < 5 else 100.0)))
    device.publish("up", b"a" * 60)
    device.publish("up", b"b" * 100)
    assert device.due_at == 6.0
    device.move(6.0)
    assert device.due_at == 7.0


def test_a_device_that_is_busy_says_nothing_before_it_is_done():
    *_, device, _ = linked(Line())
    device.hold(4.0)
    device.publish("up", b"c")
    assert device.due_at == 4.0
