"""Who shares a stream with whom, and when a part of it is published."""

import math

import pytest

from fleetune.broker.service.streams import LATE_MAX, QUIET_S, SHARED_BYTES_MIN, Answer, Streams
from fleetune.device_runtime.contracts.parts import FIRST_CHUNKS, GATHER_S, PART_CHUNKS, chunks_of, part_of
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import Request
from fleetune.device_runtime.errors import WireError

CHUNK = 4000
TRANSFER = Outgoing(bytes(30 * CHUNK), chunk_bytes=CHUNK).manifest
OTHER = Outgoing(b"x" * 30 * CHUNK, chunk_bytes=CHUNK).manifest


def streams_of(*names, transfer=TRANSFER):
    """Streams in which these devices were offered a transfer together, and the name of theirs."""
    streams = Streams("s")
    for name in names:
        streams.listens(name, is_able=True)
    (stream,) = {streams.name_for(name, transfer, 0.0) for name in names}
    return streams, stream


def request(stream, part=0, *, indices=None, transfer=TRANSFER):
    bits = sum(1 << i for i in (chunks_of(part) if indices is None else indices) if i < 30)
    return Request(sha256=transfer.sha256, missing=bits.to_bytes(4, "little"), shared=stream)


def wanted(passed):
    bits = int.from_bytes(passed.request.missing, "little")
    return [i for i in range(32) if bits >> i & 1]


def test_parts_are_all_chunks_in_their_order_each_once():
    found = [i for part in range(4) for i in chunks_of(part)]
    assert found == list(range(FIRST_CHUNKS + 3 * PART_CHUNKS))
    assert [part_of(i) for i in (0, 3, 4, 19, 20, 36)] == [0, 0, 1, 1, 2, 3]


def test_a_part_is_published_when_all_who_were_offered_it_have_asked():
    streams, stream = streams_of("a", "b", "c")
    for name in ("a", "b"):
        assert streams.ask(name, request(stream), 1.0) is Answer.GATHERED
        assert not [*streams.due(1.0)], "c may ask, too"
    streams.ask("c", request(stream, indices=[2, 3]), 1.0)
    (passed,) = streams.due(1.0)
    assert passed.devices == ("a", "b", "c")
    assert (passed.stream, passed.part, wanted(passed)) == (stream, 0, [0, 1, 2, 3])
    assert not [*streams.due(9.0)], "each once"
    assert streams.due_at == math.inf


def test_who_does_not_ask_is_waited_for_no_longer_than_others_keep_coming():
    streams, stream = streams_of("a", "b", "c")
    streams.ask("a", request(stream), 0.1)
    assert streams.due_at == 0.1 + QUIET_S
    streams.ask("b", request(stream), 0.3)
    assert streams.due_at == 0.3 + QUIET_S
    assert [p.devices for p in streams.due(0.3 + QUIET_S)] == [("a", "b")]


def test_a_fleet_that_takes_long_to_ask_is_given_longer():
    names = [f"d{n}" for n in range(30)]
    streams, stream = streams_of(*names)
    for name in names[:-1]:
        streams.ask(name, request(stream), 0.8)
    assert 0.8 + QUIET_S < streams.due_at < 0.8 + 2 * 0.8


def test_who_asked_first_waits_so_long_at_most():
    names = [f"d{n}" for n in range(60)]
    streams, stream = streams_of(*names)
    for number, name in enumerate(names[:-1]):
        streams.ask(name, request(stream), 0.2 * number)
    assert streams.due_at == GATHER_S


def test_the_next_part_waits_for_those_who_got_the_one_before_and_for_no_others():
    streams, stream = streams_of("a", "b", "c")
    streams.ask("a", request(stream), 0.0)
    streams.ask("b", request(stream), 0.0)
    assert len([*streams.due(QUIET_S)]) == 1, "without c"
    streams.ask("a", request(stream, 1), 1.0)
    assert not [*streams.due(1.0)]
    streams.ask("b", request(stream, 1), 1.0)
    assert [p.devices for p in streams.due(1.0)] == [("a", "b")]


def test_who_is_late_is_offered_the_next_stream_and_late_too_often_is_served_alone():
    streams, stream = streams_of("a", "b", "c", "d")
    streams.ask("a", request(stream), 0.0)
    assert len([*streams.due(QUIET_S)]) == 1
    assert [streams.ask(name, request(stream), 1.0) for name in "bc"] == [Answer.LATE] * 2
    second, again = (streams.name_for(name, TRANSFER, 1.0) for name in "bc")
    assert second == again != stream
    assert streams.name_for("a", TRANSFER, 1.0) == stream, "who is not late stays"
    for number in range(LATE_MAX):
        streams.listens(f"x{number}", is_able=True)
        quick = streams.name_for(f"x{number}", TRANSFER, 1.0)
        assert quick == again, "c is offered what others are offered then"
        streams.ask(f"x{number}", request(quick), 1.0)
        assert len([*streams.due(9.0)]) == 1
        answer = streams.ask("c", request(again), 2.0)
        again = streams.name_for("c", TRANSFER, 2.0)
    assert answer is Answer.ALONE


def test_who_wants_something_else_or_is_gone_waits_for_nothing_and_nobody_waits_for_it():
    streams, stream = streams_of("a", "b", "c")
    streams.ask("a", request(stream), 0.0)
    streams.ask("b", request(stream), 0.0)
    assert streams.name_for("a", OTHER, 0.0) not in ("", stream), "a version was superseded"
    streams.leave("c")
    assert [p.devices for p in streams.due(0.0)] == [("b",)]


def test_devices_that_come_one_after_another_share_all_but_the_first():
    streams, _ = streams_of("x", transfer=OTHER)
    found = []
    for number in range(5):
        name, now = f"d{number}", 0.1 * number
        streams.listens(name, is_able=True)
        streams.ask(name, request(streams.name_for(name, TRANSFER, now)), now)
        found += [p.devices for p in streams.due(now)]
    found += [p.devices for p in streams.due(9.0)]
    assert found == [("d0",), ("d1", "d2", "d3", "d4")]


def test_what_is_short_or_for_who_cannot_listen_is_not_shared():
    short = Outgoing(bytes(SHARED_BYTES_MIN - 1)).manifest
    streams, _ = streams_of("a")
    assert streams.name_for("a", short, 0.0) == ""
    assert streams.name_for("old", TRANSFER, 0.0) == ""
    streams.listens("a", is_able=False)
    assert streams.name_for("a", OTHER, 0.0) == ""
    off = Streams("s", is_on=False)
    off.listens("a", is_able=True)
    assert off.name_for("a", TRANSFER, 0.0) == ""


def test_requests_that_fit_no_stream_are_served_alone_or_refused():
    streams, stream = streams_of("a")
    assert streams.ask("b", request(stream), 0.0) is Answer.ALONE, "it was offered nothing"
    assert streams.ask("a", request("s-9"), 0.0) is Answer.ALONE, "another life of the aggregator"
    assert streams.ask("a", request(stream, transfer=OTHER), 0.0) is Answer.ALONE
    for missing in (b"", bytes(4), b"\xff" * 5):
        with pytest.raises(WireError, match="bitmap"):
            streams.ask("a", Request(sha256=TRANSFER.sha256, missing=missing, shared=stream), 0.0)


def test_a_request_across_parts_gets_the_first():
    streams, stream = streams_of("a")
    streams.ask("a", request(stream, indices=range(2, 30)), 0.0)
    (passed,) = streams.due(0.0)
    assert (passed.part, wanted(passed)) == (0, [2, 3])


def test_nothing_is_remembered_of_streams_without_devices():
    streams, _ = streams_of("a", "b")
    for name in "ab":
        streams.leave(name)
    assert not any([streams._named, streams._open, streams._of, streams._gathering])
