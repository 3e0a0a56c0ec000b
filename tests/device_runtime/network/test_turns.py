from math import inf

import pytest

from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.turns import Turns


class Member:
    """Reads what has come, and is due at times of its own."""

    def __init__(self, turns, link, *due):
        self.link, self.due, self.polled, self.read = link, list(due), [], []
        turns.join(link, self)

    def poll(self, now):
        self.polled.append(now)
        self.due = [time for time in self.due if time > now]
        if message := self.link.receive(0):
            self.read.append(message[1])

    def due_at(self, now):
        return min(self.due, default=inf)


@pytest.fixture
def server():
    return Loopback()


@pytest.fixture
def turns(server):
    return Turns(server)


def test_the_clock_jumps_to_the_next_who_is_due_and_nobody_else_has_a_turn(server, turns):
    one, other = (Member(turns, server.connect([]), *due) for due in ([3.0, 5.0], [4.0]))
    while turns.turn():
        pass
    assert (one.polled, other.polled) == ([0.0, 3.0, 5.0], [0.0, 4.0])
    assert turns.now == 5.0


def test_a_message_wakes_its_reader_at_once_and_in_the_order_of_the_news(server, turns):
    members = [Member(turns, server.connect([topic]), 9.0) for topic in "ab"]
    turns.turn()
    sender = server.connect([])
    for topic in "ba":
        sender.publish(topic, topic.encode())
    order = []
    for member in members:
        member.poll = lambda now, member=member: order.append(member.link.receive(0)[1])
    turns.turn()
    assert (order, turns.now) == ([b"b", b"a"], 0.0)


def test_who_leaves_messages_unread_has_the_next_turn_too(server, turns):
    member = Member(turns, server.connect(["t"]))
    for payload in (b"1", b"2", b"3"):
        server.connect([]).publish("t", payload)
    while turns.turn():
        pass
    assert (member.read, member.polled) == ([b"1", b"2", b"3"], [0.0] * 3)


def test_who_has_been_asked_in_vain_is_not_asked_again(server, turns):
    """A message read within the turn in which it came is no reason for another turn."""
    reader, writer = (Member(turns, server.connect([topic])) for topic in ("t", "u"))
    turns.turn()
    writer.link.publish("t", b"x")
    reader.poll(turns.now)
    assert turns.turn() is False
    assert len(reader.polled) == 2


def test_a_time_that_has_moved_counts_and_the_one_before_does_not(server, turns):
    member, other = Member(turns, server.connect(["t"]), 5.0), Member(turns, server.connect([]), 6.0)
    turns.turn()
    member.due = [7.0]
    server.connect([]).publish("t", b"x")
    while turns.turn():
        pass
    assert (member.polled, other.polled) == ([0.0, 0.0, 7.0], [0.0, 6.0])


def test_who_has_left_has_no_turns(server, turns):
    member = Member(turns, server.connect(["t"]), 5.0)
    turns.turn()
    turns.leave(member.link)
    server.connect([]).publish("t", b"x")
    assert turns.turn() is False
    assert (member.polled, turns.now) == ([0.0], 0.0)


def test_a_run_ends_when_it_is_asked_to_or_nobody_will_ever_have_anything_to_do(server, turns):
    Member(turns, server.connect([]), 1.0, 2.0, 3.0)
    assert turns.run(until=lambda: turns.now >= 2.0)
    assert turns.now == 2.0
    assert not turns.run(until=lambda: False)


def test_a_turn_costs_no_more_for_those_who_wait(server, turns):
    waiting = [Member(turns, server.connect([f"{i}"]), 1000.0 + i) for i in range(50)]
    busy = Member(turns, server.connect([]), *range(1, 500))
    turns.turn()
    asked = []
    for member in waiting:
        member.due_at = lambda now: asked.append(now) or inf
    turns.run(until=lambda: turns.now >= 499)
    assert (len(busy.polled), asked) == (500, [])


def test_times_that_have_moved_are_forgotten_in_the_end(server, turns):
    member = Member(turns, server.connect(["t"]), 1e6)
    sender = server.connect([])
    for i in range(1000):
        member.due = [1e6 + i % 2]
        sender.publish("t", b"x")
        turns.turn()
    assert len(member.read) > 900
    assert len(turns._heap) < 100
    turns.run(until=lambda: turns.now >= 1e6)
    assert member.polled[-1] == 1e6 + 1, "what is due is kept"
