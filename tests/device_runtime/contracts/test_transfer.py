"""Transfers over a pretended network that loses, repeats, reorders and corrupts; bad manifests and chunks."""

import contextlib
import hashlib
import random
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.device_runtime.contracts.fields import CHUNK_BYTES, MESSAGE_BYTES_MAX
from fleetune.device_runtime.contracts.pull import PATIENCE, SLOWEST_BYTES_S, Pull
from fleetune.device_runtime.contracts.transfer import (
    NUM_CHUNKS_MAX,
    REQUEST_CHUNKS_MAX,
    Incoming,
    Outgoing,
)
from fleetune.device_runtime.contracts.wire import Chunk, Offer, Request, encode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import TransportError, WireError

CONTENT = bytes(range(256)) * 10  # 2560 bytes: 3 chunks of 1000, the last of 560


def pair(content: bytes = CONTENT, chunk_bytes: int = 1000) -> tuple[Outgoing, Incoming]:
    outgoing = Outgoing(content, chunk_bytes=chunk_bytes)
    return outgoing, Incoming(outgoing.manifest, size_bytes_max=len(content))


def all_chunks(outgoing: Outgoing) -> list[Chunk]:
    request = Incoming(outgoing.manifest, size_bytes_max=1 << 40).request(limit=NUM_CHUNKS_MAX)
    return list(outgoing.chunks(request)) if request else []


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 8000, 8001])
def test_content_arrives_whole(size):
    outgoing, incoming = pair(random.Random(size).randbytes(size))
    while request := incoming.request(limit=3):
        for chunk in outgoing.chunks(request):
            assert incoming.add(chunk)
    assert incoming.done
    assert hashlib.sha256(incoming.content()).hexdigest() == outgoing.manifest.sha256


def test_whatever_a_request_says_so_many_chunks_are_served_at_once():
    outgoing, incoming = pair(bytes(50_000))
    served = list(outgoing.chunks(incoming.request(limit=2**31)))
    assert [chunk.index for chunk in served] == list(range(REQUEST_CHUNKS_MAX))


def test_the_manifest_and_the_first_request_to_the_byte():
    outgoing, incoming = pair()
    manifest = outgoing.manifest
    assert (manifest.size_bytes, manifest.chunk_bytes, len(manifest.chunk_digests)) == (2560, 1000, 24)
    assert manifest.chunk_digests[16:] == hashlib.sha256(CONTENT[2000:]).digest()[:8]
    assert incoming.request() == Request(sha256=manifest.sha256, missing=b"\x07", limit=16)


def test_a_request_names_what_is_missing_and_the_limit_holds():
    outgoing, incoming = pair(bytes(9000))
    chunks = all_chunks(outgoing)
    for index in (0, 3, 8):
        incoming.add(chunks[index])
    request = incoming.request(limit=2)
    assert request.missing == bytes([0b11110110, 0])
    assert [c.index for c in outgoing.chunks(request)] == [1, 2]
    assert list(outgoing.chunks(msgspec.structs.replace(request, limit=-1))) == []


def test_a_repeated_chunk_is_no_news():
    outgoing, incoming = pair()
    first = all_chunks(outgoing)[0]
    assert [incoming.add(first), incoming.add(first)] == [True, False]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, "chunk of transfer"),
        ({"index": 3}, "chunk 3 of 3"),
        ({"index": -1}, "chunk -1 of 3"),
        ({"index": 2}, "1000 bytes, expected 560"),
        ({"data": b"short"}, "5 bytes, expected 1000"),
    ],
)
def test_a_bad_chunk_is_refused_and_not_stored(change, said):
    outgoing, incoming = pair()
    with pytest.raises(WireError, match=said):
        incoming.add(msgspec.structs.replace(all_chunks(outgoing)[0], **change))
    assert [*incoming.missing()] == [0, 1, 2]


@pytest.mark.parametrize("change", [{"index": 1}, {"data": bytes(1000)}])
def test_a_damaged_chunk_is_found_at_the_end_and_the_others_are_kept(change):
    outgoing, incoming = pair()
    damaged = msgspec.structs.replace(all_chunks(outgoing)[0], **change)
    place = damaged.index
    for chunk in (damaged, *all_chunks(outgoing)):
        incoming.add(chunk)
    with pytest.raises(WireError, match=f"chunk {place}: its digest differs"):
        incoming.verify()
    assert (incoming.done, [*incoming.missing()]) == (False, [place])
    with pytest.raises(WireError, match=f"chunk {place}: its digest differs"):
        incoming.add(damaged)  # a second time it is known at once
    incoming.add(all_chunks(outgoing)[place])
    assert incoming.content() == CONTENT


def test_who_slips_chunks_in_delays_a_pull_once():
    outgoing, one = pull(6, window=6)
    request = one.due(0.0)
    chunks = [*outgoing.chunks(request)]
    foreign = [msgspec.structs.replace(chunk, data=bytes(10)) for chunk in chunks]
    for chunk in (*foreign, *chunks):
        one.add(chunk, 1.0)
    rest = one.due(1.0)
    *first, last = outgoing.chunks(rest)
    for chunk in first:
        one.add(chunk, 2.0)
    with pytest.raises(WireError, match="chunk 0, 1, 2, 3: its digest differs"):
        one.add(last, 2.0)
    assert (one.num_flying, one.done) == (0, False)
    again = one.due(2.0)
    assert indices(outgoing, again) == [0, 1, 2, 3]
    for stranger, chunk in zip(foreign, outgoing.chunks(again), strict=True):
        with pytest.raises(WireError, match="digest differs"):
            one.add(stranger, 3.0)
        one.add(chunk, 3.0)
    assert one.content() == b"".join(c.data for c in all_chunks(outgoing))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size_bytes": 5000}, "5000 bytes; expected 0 to 2560; 24 bytes of digests for 5 chunks"),
        ({"size_bytes": -1}, "-1 bytes"),
        ({"size_bytes": 1 << 60}, "expected 0 to 2560"),
        ({"chunk_bytes": 0}, "chunks of 0 bytes"),
        ({"chunk_bytes": CHUNK_BYTES + 1}, "chunks of"),
        ({"chunk_bytes": 1}, "bytes of digests for 2560 chunks"),
        ({"chunk_digests": b""}, "0 bytes of digests for 3 chunks"),
        ({"sha256": "X" * 64}, "not 64 hexadecimal"),
    ],
)
def test_an_inconsistent_manifest_is_refused(change, said):
    manifest = msgspec.structs.replace(pair()[0].manifest, **change)
    with pytest.raises(WireError, match=said):
        Incoming(manifest, size_bytes_max=2560)


def test_more_chunks_than_an_announcement_holds_are_refused_on_both_sides():
    with pytest.raises(TransportError, match="raise the MQTT server's packet limit"):
        Outgoing(bytes(NUM_CHUNKS_MAX + 1), chunk_bytes=1)
    largest = Outgoing(bytes(NUM_CHUNKS_MAX), chunk_bytes=1).manifest
    digests = largest.chunk_digests + bytes(8)
    huge = msgspec.structs.replace(largest, size_bytes=NUM_CHUNKS_MAX + 1, chunk_digests=digests)
    with pytest.raises(WireError, match="at most 8192 are taken"):
        Incoming(huge, size_bytes_max=1 << 30)
    offer = Offer(
        job="j", round=1, version=0, role="train", work=LocalWork(), adapter=largest, deadline_s=1.0
    )
    assert len(encode(offer)) < MESSAGE_BYTES_MAX


def test_foreign_and_misshapen_requests_are_refused():
    outgoing, incoming = pair()
    request = incoming.request()
    with pytest.raises(WireError, match="request for transfer"):
        outgoing.chunks(msgspec.structs.replace(request, sha256="0" * 64))
    with pytest.raises(WireError, match="bitmap of 2 bytes for 3 chunks"):
        outgoing.chunks(msgspec.structs.replace(request, missing=b"\x07\x00"))


def test_a_whole_that_differs_is_refused_and_forgotten():
    outgoing = Outgoing(CONTENT, chunk_bytes=1000)
    liar = msgspec.structs.replace(outgoing.manifest, sha256="0" * 64)
    incoming = Incoming(liar, size_bytes_max=2560)
    for chunk in all_chunks(outgoing):
        incoming.add(msgspec.structs.replace(chunk, sha256="0" * 64))
    with pytest.raises(WireError, match="SHA-256 of the whole differs"):
        incoming.content()
    assert [*incoming.missing()] == [0, 1, 2]


def test_content_before_the_end_is_refused():
    with pytest.raises(WireError, match="3 of 3 chunks are missing"):
        pair()[1].content()


def pull(num_chunks: int, **options) -> tuple[Outgoing, Pull]:
    outgoing = Outgoing(random.Random(1).randbytes(10 * num_chunks), chunk_bytes=10)
    return outgoing, Pull(outgoing.manifest, size_bytes_max=10 * num_chunks, now=0.0, **options)


def indices(outgoing: Outgoing, request: Request | None) -> list[int]:
    return [] if request is None else [c.index for c in outgoing.chunks(request)]


def test_a_pull_keeps_a_growing_window_on_its_way():
    outgoing, one = pull(40, window=6)
    chunks = all_chunks(outgoing)
    assert indices(outgoing, one.due(0.0)) == [0, 1, 2, 3]
    assert one.due(0.1) is None
    one.add(chunks[0], 0.2)  # window 5, three on their way
    assert one.due(0.2) is None
    one.add(chunks[1], 0.3)  # window 6, two on their way
    assert indices(outgoing, one.due(0.3)) == [4, 5, 6, 7]


def test_a_pull_asks_again_after_a_stall_for_one_chunk_and_with_more_patience():
    outgoing, one = pull(40, stall_s=5.0)
    one.due(0.0)
    assert one.due(4.9) is None
    assert indices(outgoing, one.due(5.0)) == [0]
    assert one.due(14.9) is None
    assert indices(outgoing, one.due(15.0)) == [0]
    assert one.progress_at == 0.0


def test_a_slow_link_is_not_taken_for_a_dead_one():
    outgoing, one = pull(12, stall_s=5.0)
    queue = indices(outgoing, one.due(0.0))
    sent, now = len(queue), 0.0
    while not one.done:  # ten seconds a chunk, looked at every second
        for _ in range(10):
            now += 1
            again = indices(outgoing, one.due(now))
            queue, sent = queue + again, sent + len(again)
        one.add(all_chunks(outgoing)[queue.pop(0)], now)
    assert sent <= 12 + 1  # one chunk was asked for twice, before the pace was known
    assert one.progress_at == now


def test_a_link_of_which_nothing_is_known_is_given_the_time_of_a_slow_one():
    outgoing = Outgoing(bytes(400_000), chunk_bytes=100_000)
    one = Pull(outgoing.manifest, size_bytes_max=400_000, now=0.0)
    one.due(0.0)
    assert one.waits_until == PATIENCE * 400_000 / SLOWEST_BYTES_S


def test_patience_follows_the_measured_pace():
    outgoing, one = pull(40, stall_s=1.0)
    chunks = [outgoing._chunk(index) for index in range(40)]
    one.due(0.0)
    one.add(chunks[0], 20.0)  # 2 s a byte: two of 20 s are as much as is on its way at once
    assert one.waits_until == 20.0 + PATIENCE * 3 * 20.0
    one.add(chunks[1], 40.0)
    one.add(chunks[2], 60.0)
    assert indices(outgoing, one.due(60.0)) == [4]
    assert one.waits_until == 60.0 + PATIENCE * 2 * 20.0
    for index in range(3, 40):  # ever quicker
        one.add(chunks[index], 60.0 + index / 100)
        one.due(60.0 + index / 100)
    assert one.done


def test_what_an_overrun_end_lost_is_asked_for_once_more_and_nothing_else():
    """A quarter of all messages is thrown away while chunks keep coming."""
    rng = random.Random(0)
    outgoing, one = pull(400, stall_s=5.0)
    now, sent, lost, wire = 0.0, 0, 0, []
    while not one.done:
        now += 0.1
        for index in indices(outgoing, one.due(now)):
            sent += 1
            is_lost = rng.random() < 0.25
            lost += is_lost
            wire += [] if is_lost else [index]
        if wire:
            one.add(outgoing._chunk(wire.pop(0)), now)
    assert lost > 50
    assert sent <= 400 + lost


def test_when_all_on_its_way_was_lost_one_is_tried_and_then_the_others_together():
    outgoing, one = pull(40, stall_s=5.0)
    assert indices(outgoing, one.due(0.0)) == [0, 1, 2, 3]
    assert indices(outgoing, one.due(5.0)) == [0]
    one.add(all_chunks(outgoing)[0], 5.1)
    assert one.due(5.1) is None
    assert indices(outgoing, one.due(one.waits_until)) == [1, 2, 3]


def test_a_reconnection_asks_at_once_for_half_as_many():
    outgoing, one = pull(40)
    one.due(0.0)
    one.restart(1.0)
    assert indices(outgoing, one.due(1.0)) == [0, 1]


def test_what_has_come_is_kept_when_chunks_become_smaller_or_larger():
    content = bytes(range(256)) * 10
    coarse, fine = Outgoing(content, chunk_bytes=1000), Outgoing(content, chunk_bytes=500)
    one = Pull(coarse.manifest, size_bytes_max=2560, now=0.0)
    one.due(0.0)
    _first, second, third = all_chunks(coarse)
    one.add(second, 1.0)
    again = one.cut_anew(fine.manifest, size_bytes_max=2560, now=2.0)
    assert indices(fine, again.due(2.0)) == [0, 1, 4, 5]
    for chunk in (all_chunks(fine)[i] for i in (0, 1, 4)):
        again.add(chunk, 3.0)
    last = again.cut_anew(coarse.manifest, size_bytes_max=2560, now=4.0)
    assert indices(coarse, last.due(4.0)) == [2], "of the last chunk a part is missing"
    last.add(third, 5.0)
    assert last.content() == content
    other = Outgoing(b"x" * 2560, chunk_bytes=500)
    assert indices(other, one.cut_anew(other.manifest, size_bytes_max=2560, now=6.0).due(6.0)) == [0, 1, 2, 3]


def test_nothing_to_pull_is_done_at_once():
    _, one = pull(0)
    assert one.done
    assert one.due(0.0) is None
    assert one.content() == b""


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(0, 3000), loss=st.floats(0, 0.6), mess=st.floats(0, 0.4))
def test_a_pull_survives_any_network(seed, size, loss, mess):
    rng = random.Random(seed)
    outgoing = Outgoing(rng.randbytes(size), chunk_bytes=100)
    one = Pull(outgoing.manifest, size_bytes_max=size, now=0.0)
    now, wire = 0.0, []
    while not one.done:
        now += 0.5
        assert now < 100_000, "no end in sight"
        if (request := one.due(now)) and rng.random() >= loss:
            copies = 1 + (rng.random() < mess)
            wire += [c for c in outgoing.chunks(request) for _ in range(copies) if rng.random() >= loss]
        if rng.random() < mess:
            rng.shuffle(wire)
        for chunk in wire[:3]:
            with contextlib.suppress(WireError):
                one.add(corrupted(chunk, rng) if rng.random() < mess else chunk, now)
        del wire[:3]
    assert hashlib.sha256(one.content()).hexdigest() == outgoing.manifest.sha256


def corrupted(chunk: Chunk, rng: random.Random) -> Chunk:
    place = rng.randrange(len(chunk.data))
    flipped = bytes([chunk.data[place] ^ 1 << rng.randrange(8)])
    data = chunk.data[:place] + flipped + chunk.data[place + 1 :]
    change = rng.choice([{"data": data}, {"index": chunk.index + 1}])
    return msgspec.structs.replace(chunk, **change)


def test_a_whole_that_was_put_together_is_held_once():
    content = random.Random(5).randbytes(3_000_000)
    outgoing, incoming = pair(content, CHUNK_BYTES)
    tracemalloc.start()
    try:
        for chunk in all_chunks(outgoing):
            incoming.add(chunk)
        whole = incoming.content()
        del chunk
        assert tracemalloc.get_traced_memory()[0] < 1.1 * len(content)
    finally:
        tracemalloc.stop()
    assert whole == incoming.content() == content
    assert not incoming.add(all_chunks(outgoing)[0]), "it is here already"
