from math import inf

from fleetune.broker.service.timers import Timers


def test_a_thing_is_due_when_it_was_looked_at_and_when_its_time_has_come():
    times = {"a": 5.0, "b": 3.0, "c": inf}
    timers = Timers(times.__getitem__)
    for name in times:
        timers.set(name)
    assert timers.due_at() == 3.0
    assert timers.take(2.9) == []
    timers.look("c")
    assert (timers.due_at(), timers.looked_at) == (-inf, ["c"])
    assert timers.take(3.0) == ["c", "b"]
    assert timers.due_at() == 5.0


def test_what_is_put_off_is_due_later_and_what_is_dropped_never():
    times = {"a": 5.0, "b": 6.0}
    timers = Timers(times.__getitem__)
    for name in times:
        timers.set(name)
    times["a"] = 9.0
    assert timers.due_at() == 6.0
    timers.drop("b")
    assert (timers.take(8.0), timers.due_at()) == ([], 9.0)
    times["a"] = 4.0
    timers.set("a")
    assert timers.take(4.0) == ["a"]
