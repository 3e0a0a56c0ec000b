from collections import Counter

import pytest

from fleetune.broker.methods.selection import SELECTIONS, Roster, seeded, uniform

DEVICES = tuple(f"d{i}" for i in range(10))


def in_order(count):
    return range(count)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("limit", [0, 1, 4, 10, 99])
def test_law_as_many_as_asked_for_each_once_in_their_order(name, limit):
    chosen = SELECTIONS[name](DEVICES, {"d3"}, limit, seeded(7, round_number=1))
    assert len(chosen) == min(limit, len(DEVICES))
    assert list(chosen) == [device for device in DEVICES if device in chosen]


@pytest.mark.parametrize("name", SELECTIONS)
def test_law_equal_draws_choose_equally(name):
    assert SELECTIONS[name](DEVICES, (), 4, seeded(7, round_number=3)) == SELECTIONS[name](
        DEVICES, (), 4, seeded(7, round_number=3)
    )
    assert (
        len({SELECTIONS[name](DEVICES, (), 4, seeded(7, round_number=number)) for number in range(20)}) > 10
    )


def test_paused_devices_come_after_the_others():
    assert uniform("abcd", {"a", "b"}, 3, in_order) == ("a", "c", "d")
    assert uniform("abcd", {"a", "b"}, 2, in_order) == ("c", "d")


def test_each_is_as_likely_as_another():
    counts = Counter(
        d for number in range(2000) for d in uniform(DEVICES, (), 3, seeded(1, round_number=number))
    )
    assert all(500 < counts[device] < 700 for device in DEVICES)


def test_a_roster_gives_each_device_once_a_round():
    roster = Roster(uniform)
    for device in "cab":
        roster.arrive(device, is_asked=False)
    assert roster.present == ("a", "b", "c")
    assert roster.take(2, in_order) == ("a", "b")
    roster.arrive("a", is_asked=True)
    assert roster.take(2, in_order) == ("c",)
    assert roster.take(2, in_order) == ()
    roster.leave("c")
    roster.release()
    assert roster.take(9, in_order) == ("a", "b")


def test_a_pause_is_remembered_of_who_is_not_here():
    roster = Roster(uniform)
    roster.pause("a", "hot")
    assert roster.paused == {"a": "hot"}
    roster.arrive("a", is_asked=False)
    roster.arrive("b", is_asked=False)
    assert roster.take(1, in_order) == ("b",)
    roster.pause("a", "")
    assert roster.paused == {}
