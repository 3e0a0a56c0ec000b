"""Who is not asked for a while, and that a round goes on without them."""

import pytest
from rounds_by_hand import federation, give, hello, of, past, update

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.rounds.actions import Assign, Close, Dismiss, Enrol
from fleetune.broker.rounds.quarantine import TERM, WINDOW, Quarantine
from fleetune.broker.tasks import FAR, LENGTH, PARDONED, REFUSED, Mark


def strikes(*rounds, device="a", kind=FAR):
    return [Mark(number, device, kind) for number in rounds]


def test_three_strikes_in_the_window_and_a_device_is_left_out_for_its_term():
    found = Quarantine(3, strikes(1, 2, 5))
    assert [n for n in range(1, 40) if found.holds("a", n)] == [*range(7, 7 + TERM)]
    assert found.until(7) == {"a": 6 + TERM}
    assert found.until(7 + TERM) == {}
    assert not found.holds("b", 8)


def test_strikes_far_apart_or_of_another_kind_do_not_add_up():
    assert Quarantine(3, strikes(1, 2, 1 + WINDOW)).until(0) == {}
    assert Quarantine(3, strikes(1, 2, 3, kind=LENGTH)).until(0) == {}
    assert Quarantine(3, [*strikes(1, 1, 2), *strikes(1, 2, kind=REFUSED)]).until(0) == {}, "once a round"
    assert Quarantine(0, strikes(*range(20))).until(0) == {}


def test_a_pardon_forgives_what_was_before():
    assert Quarantine(3, [*strikes(1, 2, 3), Mark(4, "a", PARDONED)]).until(0) == {}
    assert Quarantine(3, [*strikes(1, 2), Mark(2, "a", PARDONED), *strikes(3, 4)]).until(0) == {}


@pytest.mark.parametrize("strikes_max", [1, 2, 3])
def test_the_marks_of_the_round_before_change_no_choice(strikes_max):
    """They may be durable when a round opens, or not yet: a restart chooses as if nothing had happened."""
    for number in range(2, 40):
        earlier = strikes(*range(1, number - 1))
        one, other = (
            Quarantine(strikes_max, earlier),
            Quarantine(strikes_max, [*earlier, *strikes(number - 1)]),
        )
        assert one.holds("a", number) == other.holds("a", number)


def held(*devices, rounds=(1, 2, 3), **changes):
    """A job with four rounds done, whose marks leave devices out."""
    marks = tuple(Mark(n, d, REFUSED) for n in rounds for d in devices)
    return federation(past(version=4, closed=4, marks=marks), **{"rounds": 9, **changes})


def test_a_device_that_is_left_out_is_not_asked():
    machine = held("a", clients=1, min_clients=1)
    assert machine.hello(hello("a"), 0.0) == []
    (enrolled, _) = machine.hello(hello("b"), 1.0)
    assert [task.device_id for task in enrolled.tasks] == ["b"]


def test_a_fleet_of_three_goes_on_with_two():
    machine = held("a", clients=3, min_clients=3)
    actions = [action for name in ("a", "b", "c") for action in machine.hello(hello(name), 1.0)]
    assert [t.device_id for t in of(Enrol, actions)[0].tasks] == ["b", "c"]
    give(machine, "b", 5)
    assert of(Close, give(machine, "c", 5)) == [Close(5, 5, ("b", "c"))]


def test_under_masks_nobody_is_left_out_and_nobody_excused():
    masked = {"secure": "masks", "clients": 4, "min_clients": 4, "secure_range": 1.0}
    machine = held("a", **masked)
    actions = [action for name in ("a", "b", "c", "d") for action in machine.hello(hello(name), 1.0)]
    assert [t.device_id for t in of(Enrol, actions)[0].tasks] == ["a", "b", "c", "d"]
    machine.marked([Mark(5, "a", REFUSED)])
    assert machine.rounds.quorum.least(5, deadline_of=machine.rounds.open_round) == 4
    assert held("a", **{**masked, "secure": "grid"}).rounds.quarantine.holds("a", 5), "the grid hides nobody"


def test_half_of_a_round_is_never_excused():
    machine = held("a", "b", clients=3, min_clients=3)
    assert [action for name in ("a", "b", "c") for action in machine.hello(hello(name), 1.0)] == []
    machine = held("a", clients=2, min_clients=2)
    assert [action for name in ("a", "b") for action in machine.hello(hello(name), 1.0)] == []


def test_nobody_is_excused_where_there_are_others():
    machine = held("a", clients=2, min_clients=2)
    for name in ("a", "b", "c"):
        machine.hello(hello(name), 1.0)
    assert of(Close, give(machine, "b", 5)) == []


def test_a_round_closes_at_its_deadline_without_the_one_that_sends_garbage():
    """By default all clients are needed: one that sends garbage ended a job after eleven deadlines."""
    machine = federation(clients=3, min_clients=3, patience=Patience(deadline_s=100))
    for name in ("a", "b", "c"):
        machine.hello(hello(name), 0.0)
    machine.marked([Mark(1, "c", REFUSED)])
    assert machine.refused(update("c", 1), "implausible update", 1.0) == []
    give(machine, "a", 1)
    assert of(Close, give(machine, "b", 1)) == []
    assert of(Close, machine.tick(100.0)) == [Close(1, 1, ("a", "b"))]


def test_a_device_that_is_away_is_not_excused():
    machine = federation(clients=3, min_clients=3, patience=Patience(deadline_s=100))
    for name in ("a", "b", "c"):
        machine.hello(hello(name), 0.0)
    machine.offline("c", 1.0)
    give(machine, "a", 1)
    give(machine, "b", 1)
    assert of(Close, machine.tick(100.0)) == []


def test_only_named_devices_evaluate():
    machine = federation()
    machine.evaluations._allowed = frozenset({"judge"})
    (dismissed,) = machine.hello(hello("liar", role="evaluate"), 0.0)
    assert isinstance(dismissed, Dismiss)
    assert "not named it among those that evaluate" in dismissed.reason
    assert isinstance(machine.hello(hello("judge", role="evaluate"), 0.0)[0], Assign)
