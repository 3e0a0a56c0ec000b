from random import Random
from threading import Thread

from steps import Steps

from fleetune.device_runtime.network.mailbox import Mailbox


def up(device):
    return f"fleetune/v1/job/device/{device}/up"


def taken(box):
    return [letter[1].decode() for letter in iter(lambda: box.get(0.0), None)]


def test_each_sender_has_its_turn():
    box = Mailbox(100)
    for number in range(50):
        assert box.put(up("flood"), b"f%d" % number)
    box.put(up("honest"), b"h0")
    box.put("fleetune/v1/job/device/honest/status", b"h1")
    assert taken(box)[:4] == ["f0", "h0", "f1", "h1"]


def test_who_floods_loses_its_own_and_others_lose_nothing():
    box = Mailbox(8)
    for number in range(100):
        box.put(up("flood"), b"f%d" % number)
    assert [box.put(up("honest"), b"h%d" % n) for n in range(4)] == [False] * 4, (
        "one of the flood was thrown away"
    )
    assert not box.put(up("flood"), b"late")
    found = taken(box)
    assert [one for one in found if one[0] == "h"] == ["h0", "h1", "h2", "h3"]
    assert [one for one in found if one[0] == "f"] == ["f0", "f1", "f2", "f3"]


def test_one_sender_alone_may_fill_it():
    box = Mailbox(8)
    assert [box.put(up("a"), b"x") for _ in range(9)] == [True] * 8 + [False]
    assert len(taken(box)) == 8


def test_bytes_are_bounded_too_and_what_is_thrown_away_is_counted():
    box = Mailbox(100, limit_bytes=10)
    assert [box.put(up("flood"), b"xxx") for _ in range(4)] == [True] * 3 + [False]
    assert not box.put(up("honest"), b"yyyyyyyy"), "it takes the room of three"
    assert box.dropped == 4
    assert not box.put(up("honest"), b"x" * 11), "more than all"
    assert box.dropped == 5
    assert taken(box) == ["yyyyyyyy"]


def test_a_wait_ends_with_a_message_and_when_woken():
    for end in (lambda box: box.put(up("a"), b"x"), lambda box: box.wake()):
        box, found = Mailbox(8), []
        waiting = Thread(target=lambda box=box, found=found: found.append(box.get(60.0)))
        waiting.start()
        end(box)
        waiting.join(30.0)
        assert len(found) == 1


def test_whoever_has_most_loses_whatever_came_before():
    """Against a look at all of them, at random."""
    rng, box, waiting = Random(0), Mailbox(30), {}
    for number in range(3000):
        name = f"d{min(rng.randrange(12), rng.randrange(12))}"
        if rng.random() < 0.3:
            if letter := box.get(0.0):
                waiting[letter[0].split("/")[4]] -= 1
            continue
        most = max(waiting.values(), default=0)
        is_full, own = sum(waiting.values()) == 30, waiting.get(name, 0)
        box.put(up(name), b"%d" % number)
        found = {sender.split("/")[4]: len(letters) for sender, letters in box._senders.items()}
        if not is_full or own < most:
            waiting[name] = own + 1
        if is_full and own < most:
            (loser,) = [n for n in waiting if waiting[n] - found.get(n, 0) == 1]
            assert waiting[loser] == most
            waiting[loser] -= 1
        assert found == {n: count for n, count in waiting.items() if count}


def test_a_message_of_one_more_name_costs_the_same_however_many_wait():
    def steps(names):
        box = Mailbox(names)
        for number in range(names):
            box.put(up(number), b"x")
        box.put(up(0), b"twice as many as the others: it may lose them")
        with Steps() as counted:
            box.put(up("late"), b"x")
        return counted.number

    assert steps(20) == steps(5000)
