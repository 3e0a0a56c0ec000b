from math import inf

import msgspec
import pytest
from steps import calls_of

from fleetune.broker.service.pulls import IDLE_S, Pulls
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import UpdateReady
from fleetune.device_runtime.errors import WireError


def payload_of(number):
    return b"%04d" % number * 300


def ready(number, *, device="d", payload=None):
    manifest = Outgoing(payload_of(number) if payload is None else payload, chunk_bytes=500).manifest
    return UpdateReady(
        device_id=device,
        job="j",
        task_id=f"t{number}",
        round=1,
        version=0,
        codec="fp32",
        num_samples=1,
        payload=manifest,
    )


def filled(num, *, limit=2):
    pulls = Pulls(limit_bytes=limit * 1200)
    for number in range(num):
        pulls.begin(ready(number, device=f"d{number}"), 0.0, size_bytes_max=2000)
    return pulls


def serve(pulls, device, request, number, now=1.0):
    for chunk in Outgoing(payload_of(number), chunk_bytes=500).chunks(request):
        pulls.add(device, chunk, now)


def test_a_bounded_number_is_pulled_and_the_next_follows():
    pulls = filled(3)
    first = dict(pulls.due(0.0))
    assert first.keys() == {"d0", "d1"}
    serve(pulls, "d0", first["d0"], 0)
    (done,) = pulls.finished(1.0)
    assert (done.update.task_id, done.pull.content()) == ("t0", payload_of(0))
    assert dict(pulls.due(1.0)).keys() == {"d2"}


def test_two_tasks_of_one_device_are_pulled_side_by_side():
    pulls = Pulls()
    for number in (0, 1):
        pulls.begin(ready(number), 0.0, size_bytes_max=2000)
    for number, (device, request) in enumerate(list(pulls.due(0.0))):
        serve(pulls, device, request, number)
    assert [(u.update.task_id, u.pull.content()) for u in pulls.finished(1.0)] == [
        ("t0", payload_of(0)),
        ("t1", payload_of(1)),
    ]


def test_chunks_of_another_device_are_ignored():
    pulls = filled(1)
    ((_, request),) = pulls.due(0.0)
    serve(pulls, "d9", request, 0)
    assert pulls.finished(1.0) == []


def test_an_announcement_again_goes_on_and_another_payload_starts_afresh():
    pulls = filled(1)
    list(pulls.due(0.0))
    pulls.begin(ready(0, device="d0"), 1.0, size_bytes_max=2000)
    assert list(pulls.due(1.0)) == []
    pulls.begin(ready(0, device="d0", payload=b"other"), 1.0, size_bytes_max=2000)
    assert len(list(pulls.due(1.0))) == 1


def test_an_oversized_payload_is_refused_before_anything_else():
    with pytest.raises(WireError, match="1200 bytes"):
        Pulls().begin(ready(0), 0.0, size_bytes_max=1199)


def test_one_that_is_stuck_makes_room_and_says_when():
    pulls = filled(2, limit=1)
    list(pulls.due(0.0))
    for _ in range(10):
        due = pulls.due_at()
        asked = dict(pulls.due(due))
        if "d1" in asked:
            break
    assert due == IDLE_S


def test_it_is_due_when_a_chunk_may_be_lost_and_not_without_uploads():
    pulls = filled(1)
    assert Pulls().due_at() == inf
    assert pulls.due_at() == -inf
    list(pulls.due(3.0))
    assert pulls.due_at() == 13.0
    assert list(pulls.due(12.9)) == []
    assert list(pulls.due(13.0))


def test_what_is_not_wanted_is_dropped_waiting_or_not():
    pulls = filled(3)
    late = pulls.drop(lambda update: update.task_id == "t1")
    assert [update.task_id for update in late] == ["t0", "t2"]
    assert dict(pulls.due(1.0)).keys() == {"d1"}
    assert pulls.drop(lambda update: True) == []


def test_uploads_that_are_too_slow_for_the_deadline_give_way_one_after_another():
    """Eight devices with a byte in 55 s held all places of 0.1.0 for ever."""
    pulls = Pulls(limit_bytes=2 * 20_000)
    payload = b"x" * 500 * 40
    for number in range(3):
        update = ready(number, device=f"d{number}", payload=payload_of(number) if number == 2 else payload)
        pulls.begin(update, 0.0, size_bytes_max=50_000, until=600.0)
    outgoing = Outgoing(payload, chunk_bytes=500)
    requests = dict(pulls.due(0.0))
    drip = {d: list(outgoing.chunks(r)) for d, r in requests.items()}
    for now in (50.0, 100.0):
        for device in ("d0", "d1"):
            pulls.add(device, drip[device].pop(), now)
        found = dict(pulls.due(now))
    assert found.keys() & {"d2"}, "one has made room, and the third is asked"
    assert len([d for d in ("d0", "d1") if any(u.device_id == d for u in pulls.drop(lambda _: False))]) <= 1


def test_an_upload_that_will_be_there_in_time_keeps_its_place():
    pulls = Pulls(limit_bytes=2000)
    payload = b"x" * 500 * 4
    pulls.begin(ready(0, device="d0", payload=payload), 0.0, size_bytes_max=50_000, until=600.0)
    pulls.begin(ready(1, device="d1"), 0.0, size_bytes_max=50_000, until=600.0)
    (_, request), *_ = pulls.due(0.0)
    chunks = list(Outgoing(payload, chunk_bytes=500).chunks(request))
    for now, chunk in zip((50.0, 100.0, 150.0), chunks, strict=False):
        pulls.add("d0", chunk, now)
        assert "d1" not in dict(pulls.due(now))


def test_memory_bounds_how_many_and_one_is_always_pulled():
    pulls = Pulls(limit_bytes=1199)
    for number in range(3):
        pulls.begin(ready(number, device=f"d{number}"), 0.0, size_bytes_max=2000)
    assert dict(pulls.due(0.0)).keys() == {"d0"}
    many = filled(50, limit=50)
    assert len(dict(many.due(0.0))) == 50


def test_where_many_are_pulled_each_has_its_share_of_what_is_on_its_way():
    pulls = Pulls(flying_max=8)
    payload = b"x" * 500 * 40
    for number in range(10):
        pulls.begin(ready(number, device=f"d{number}", payload=payload), 0.0, size_bytes_max=50_000)
    asked = dict(pulls.due(0.0))
    assert len(asked) == 8, "the others wait"
    assert {request.limit for request in asked.values()} == {1}


def partly(pulls, number, *, count, payload, now=1.0):
    """Serve some of what is asked of a device."""
    outgoing = Outgoing(payload, chunk_bytes=500)
    for chunk in [*outgoing.chunks(dict(pulls.due(0.0))[f"d{number}"])][:count]:
        pulls.add(f"d{number}", chunk, now)


def test_one_whose_device_is_gone_makes_room_at_once_and_goes_on_when_it_is_back():
    pulls, payload = Pulls(limit_bytes=4000), b"x" * 500 * 4
    pulls.begin(ready(0, device="d0", payload=payload), 0.0, size_bytes_max=2000)
    partly(pulls, 0, count=3, payload=payload)
    pulls.begin(ready(1, device="d1"), 1.0, size_bytes_max=2000)
    pulls.begin(ready(2, device="d2"), 1.0, size_bytes_max=2000)
    assert dict(pulls.due(1.0)).keys() == {"d1"}
    pulls.gone("d1", 2.0)
    assert dict(pulls.due(2.0)).keys() == {"d2"}
    pulls.gone("d0", 2.0)
    pulls.begin(ready(0, device="d0", payload=payload), 3.0, size_bytes_max=2000)
    assert dict(pulls.due(3.0))["d0"].missing == b"\x08", "three of four are here"


def test_what_stands_aside_goes_when_its_memory_is_needed():
    pulls, payload = Pulls(limit_bytes=2500), b"x" * 500 * 4
    pulls.begin(ready(0, device="d0", payload=payload), 0.0, size_bytes_max=2000)
    partly(pulls, 0, count=3, payload=payload)
    pulls.gone("d0", 2.0)
    pulls.begin(ready(1, device="d1"), 2.0, size_bytes_max=2000)
    serve(pulls, "d1", dict(pulls.due(2.0))["d1"], 1)
    assert len(pulls.finished(2.0)) == 1
    pulls.begin(ready(0, device="d0", payload=payload), 3.0, size_bytes_max=2000)
    assert dict(pulls.due(3.0))["d0"].missing == b"\x0f"


def test_who_is_gone_does_not_wait_either():
    pulls = filled(3)
    pulls.gone("d2", 1.0)
    pulls.gone("d0", 1.0)
    assert dict(pulls.due(1.0)).keys() == {"d1"}


def test_who_announces_again_long_after_it_was_asked_is_asked_once_more():
    """Its request was lost: chunks come before an announcement that was made after them."""
    pulls = filled(1)
    assert [len(list(pulls.due(now))) for now in (0.0, 10.0)] == [1, 1], "its patience is 20 s now"
    for now, asked in ((19.0, 0), (21.0, 1), (22.0, 0)):
        pulls.begin(ready(0, device="d0"), now, size_bytes_max=2000)
        assert len(list(pulls.due(now))) == asked


def test_an_upload_costs_the_same_however_many_there_are():
    """Calls of the interpreter for one device's chunks: an amount that no other load changes."""
    counts = []
    for num in (20, 320):
        pulls = filled(num, limit=num)
        requests = dict(pulls.due(0.0))
        pulls.due_at()
        counts.append(calls_of(lambda p=pulls, r=requests: one_upload(p, r["d3"])))
    few, many = counts
    assert many < 1.25 * few


def one_upload(pulls, request):
    for chunk in Outgoing(payload_of(3), chunk_bytes=500).chunks(request):
        pulls.add("d3", chunk, 1.0)
        pulls.finished(1.0)
        list(pulls.due(1.0))
        pulls.due_at()


def large(number, size=5000):
    """An update of ten chunks, announced by a device of its own."""
    return ready(number, device=f"d{number}", payload=b"%04d" % number * (size // 4))


def asked(pulls, now):
    """Chunks that are asked for now, by device."""
    return {
        device: sum(bin(byte).count("1") for byte in request.missing) for device, request in pulls.due(now)
    }


def test_no_more_chunks_are_on_their_way_than_there_is_room_for():
    """As many pulls as there are, whatever their windows grew to before the others came."""
    pulls = Pulls(flying_max=10)
    pulls.begin(large(0), 0.0, size_bytes_max=9000)
    request = dict(pulls.due(0.0))["d0"]
    outgoing = Outgoing(b"0000" * 1250, chunk_bytes=500)
    for chunk in [*outgoing.chunks(request)][:3]:
        pulls.add("d0", chunk, 1.0)
    flying = 1 + sum(asked(pulls, 1.0).values())
    assert flying > 4, "its window has grown"
    for number in (1, 2, 3):
        pulls.begin(large(number), 1.0, size_bytes_max=9000)
    assert flying + sum(asked(pulls, 1.0).values()) == 10, (
        "the last has to wait, though two a pull would be its share"
    )
    pulls.gone("d0", 2.0)
    assert asked(pulls, 2.0)["d3"] > 1


def test_nothing_counts_as_lost_while_its_device_has_something_unread():
    unread = set()
    pulls = Pulls(is_unread=unread.__contains__)
    pulls.begin(ready(0), 0.0, size_bytes_max=2000)
    assert asked(pulls, 0.0) == {"d": 3}
    unread.add("d")
    assert asked(pulls, 1000.0) == {}
    pulls.begin(ready(0), 1000.0, size_bytes_max=2000)
    assert asked(pulls, 1000.0) == {}, "said again before what was asked for was read"
    unread.clear()
    assert asked(pulls, 1002.0) == {"d": 1}


def test_where_requests_take_long_a_hello_has_nothing_asked_for_twice():
    pulls = Pulls()
    for number in range(30):
        pulls.begin(ready(number, device=f"d{number}"), 0.0, size_bytes_max=2000)
    requests = dict(pulls.due(0.0))
    for number in range(29):
        serve(pulls, f"d{number}", requests[f"d{number}"], number, now=8.0)
    pulls.finished(8.0)
    pulls.restart("d29", 9.0)
    assert asked(pulls, 9.0) == {}, "others were answered after 8 s"
    pulls.restart("d29", 30.0)
    assert asked(pulls, 30.0) == {"d29": 2}


def test_who_answers_nothing_is_told_of_until_something_comes():
    pulls = filled(2)
    requests = dict(pulls.due(0.0))
    serve(pulls, "d0", requests["d0"], 0)
    assert (asked(pulls, 9.0), pulls.take_silent()) == ({}, {})
    assert (asked(pulls, 10.0), pulls.take_silent()) == ({"d1": 1}, {"d1": 0.0}), "since it was asked for it"
    assert pulls.take_silent() == {}, "once"
    serve(pulls, "d1", requests["d1"], 1, now=11.0)
    assert (asked(pulls, 11.0), pulls.take_silent()) == ({}, {})


LARGE = Outgoing(bytes(400_000), chunk_bytes=100_000)


def begin_large(pulls, number, device="d", now=0.0):
    update = msgspec.structs.replace(ready(number, device=device), payload=LARGE.manifest)
    pulls.begin(update, now, size_bytes_max=400_000)


def serve_large(pulls, device, *, begun=0.0, seconds=1.0):
    """All of it, in so many seconds."""
    for number, chunk in enumerate(LARGE.chunks(dict(pulls.due(begun))[device]), 1):
        pulls.add(device, chunk, begun + number * seconds / 4)
    assert pulls.finished(begun + seconds)


def found_silent(pulls, before, at):
    """Whether exactly one device is found silent between these times."""
    assert (asked(pulls, before), pulls.take_silent()) == ({}, {})
    asked(pulls, at)
    return pulls.take_silent()


@pytest.mark.parametrize(("seconds_before", "silent_at"), [(1.0, 10.0), (40.0, 120.0), (None, 480.0)])
def test_a_device_is_given_three_times_as_long_as_its_last_update_took(seconds_before, silent_at):
    pulls = Pulls()
    if seconds_before:
        begin_large(pulls, 0)
        serve_large(pulls, "d", seconds=seconds_before)
    begin_large(pulls, 1)
    assert asked(pulls, 0.0) == {"d": 4}
    assert found_silent(pulls, silent_at - 0.1, silent_at) == {"d": 0.0}


@pytest.mark.parametrize(("seconds", "silent_at"), [(0.3, 10.0), (4.0, 120.0)])
def test_who_sends_its_first_update_is_measured_by_the_slowest_of_some_others(seconds, silent_at):
    pulls = Pulls()
    begin_large(pulls, 9, "new")
    assert asked(pulls, 0.0) == {"new": 4}
    for number, device in enumerate("abc"):
        begin_large(pulls, number, device)
        serve_large(pulls, device, seconds=seconds if device == "b" else 0.2)
    assert found_silent(pulls, silent_at - 0.1, silent_at) == {"new": 0.0}


def test_who_is_heard_after_all_is_slow_and_given_time_in_its_next_update():
    pulls = Pulls()
    for number, device in enumerate("abc"):
        begin_large(pulls, number, device)
        serve_large(pulls, device, seconds=0.2)
    begin_large(pulls, 9, "new")
    request = dict(pulls.due(0.2))["new"]
    assert found_silent(pulls, 9.9, 10.3) == {"new": 0.0}
    pulls.drop(lambda update: False)
    pulls.add("new", next(LARGE.chunks(request)), 40.0)
    begin_large(pulls, 10, "new", now=50.0)
    assert asked(pulls, 50.0) == {"new": 4}
    assert found_silent(pulls, 50 + 479.0, 50 + 480.0) == {"new": 50.0}
