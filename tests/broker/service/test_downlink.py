"""What devices are sent of a version: differences from what they hold, and the whole wherever in doubt."""

from hashlib import sha256

import msgspec
import numpy as np
import pytest
from fleet import FOUR, first_adapter, in_process, roughly, settings_of, spoken, workbench_of, world
from safetensors.numpy import load

from fleetune.broker.service import downlink
from fleetune.broker.service import versions as versions_module
from fleetune.broker.service.downlink import Downlink
from fleetune.broker.service.versions import Versions
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.store.replicas import Replicas
from fleetune.broker.store.rows import rows
from fleetune.broker.tasks import Packing, Task
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.codecs import make_codec, pack
from fleetune.device_runtime.contracts.deltas import apply_delta
from fleetune.device_runtime.contracts.fields import CHUNK_BYTES
from fleetune.device_runtime.contracts.pull import Pull
from fleetune.device_runtime.contracts.wire import Offer, Request
from fleetune.device_runtime.errors import ConfigError, StateError, UnknownName, WireError

CHUNKS = {"chunk_bytes": CHUNK_BYTES}


def version_of(number):
    rng = np.random.default_rng(number)
    moved = rng.normal(0, 0.01, 3000).astype(np.float32) if number else 0
    return {**first_adapter(), "w": first_adapter()["w"] + moved}


class Sender:
    """A downlink over a ledger of three versions."""

    def __init__(self, tmp_path, **changes):
        self.settings = settings_of(**changes)
        self.ledger = Ledger(tmp_path, self.settings)
        for number in range(3):
            self.add(number, version_of(number))
        self.start()

    def add(self, number, adapter):
        self.ledger.add_version(number, to_bytes(adapter), round_number=number)

    def start(self):
        self.downlink = Downlink(self.ledger, self.settings)
        return self

    def digest(self, number):
        return self.downlink.offer("nobody", number, **CHUNKS).adapter_sha256

    def to(self, device, number, **how):
        return self.downlink.offer(device, number, **CHUNKS, **how)

    def content(self, download):
        pull = Pull(download.adapter, size_bytes_max=10**6, now=0.0)
        while request := pull.due(0.0):
            for chunk in self.downlink.chunks("nobody", request):
                pull.add(chunk, 0.0)
        return pull.content()


def opened(sender, download, held):
    """What a device makes of a download from the version that it holds."""
    if download.down_codec == "full":
        return sender.content(download)
    assert download.reference == sender.digest(held)
    codec = make_codec(download.down_codec, download.down_ratio, download.down_bits)
    return apply_delta(codec, sender.content(download), load(sender.ledger.version(held)))


def test_a_job_in_memory_keeps_its_replicas_in_memory():
    store = MemoryStore()
    for number in range(2):
        store.add_version(number, to_bytes(version_of(number)), round_number=number)
    downlink = Downlink(store, settings_of(down_codec="int8"))
    downlink.holds("d", sha256(store.version(0)).hexdigest())
    download = downlink.offer("d", 1, **CHUNKS)
    again = Downlink(store, settings_of(down_codec="int8")).replica(1, download.adapter_sha256)
    assert sha256(to_bytes(again)).hexdigest() == download.adapter_sha256
    downlink.close(5)
    with pytest.raises(WireError, match="does not stand for version 1"):
        downlink.replica(1, download.adapter_sha256)


def test_who_says_nothing_gets_the_whole(tmp_path):
    sender = Sender(tmp_path, down_codec="int8")
    download = sender.to("d", 1)
    assert (download.down_codec, download.reference, download.is_exact) == ("full", "", True)
    assert sender.content(download) == sender.ledger.version(1)


def test_a_difference_to_the_bit_is_the_default_and_a_job_can_have_the_whole(tmp_path):
    for codec, expected in (("full", "xor"), ("whole", "full")):
        sender = Sender(tmp_path / codec, down_codec=codec)
        sender.downlink.holds("d", sender.digest(0))
        download = sender.to("d", 1)
        assert (download.down_codec, download.is_exact) == (expected, True)
        whole = sender.to("nobody", 1).adapter.size_bytes
        assert (download.adapter.size_bytes < 0.95 * whole) == (expected == "xor")
        assert opened(sender, download, 0) == sender.ledger.version(1)


@pytest.mark.parametrize(("codec", "ratio"), [("xor", 0.0), ("fp16", 0.0), ("int8", 0.0), ("topk", 0.05)])
def test_a_difference_gives_what_the_offer_says(tmp_path, codec, ratio):
    sender = Sender(tmp_path, down_codec=codec, down_ratio=ratio)
    sender.downlink.holds("d", sender.digest(0))
    download = sender.to("d", 2)
    assert (download.down_codec, download.reference) == (codec, sender.digest(0))
    payload = sender.content(download)
    assert len(payload) < len(sender.ledger.version(2))
    made = apply_delta(make_codec(codec, ratio), payload, first_adapter())
    assert download.is_exact == (made == sender.ledger.version(2)) == (codec == "xor")
    if not download.is_exact:
        replica = sender.downlink.replica(2, download.adapter_sha256)
        assert to_bytes(replica) == made, "kept under the digest that was offered"


def test_few_bits_go_down_by_the_nearest_as_what_is_lost_goes_with_the_next(tmp_path):
    sender = Sender(tmp_path, down_codec="quant", down_bits=4)
    sender.downlink.holds("d", sender.digest(0))
    made = load(opened(sender, sender.to("d", 1), 0))["w"]
    moved, wanted = ((w - first_adapter()["w"])[:2944].reshape(-1, 128) for w in (made, version_of(1)["w"]))
    step = np.abs(wanted).max(axis=1, keepdims=True) / 7
    assert (np.abs(moved - wanted) < 0.51 * step).all()


@pytest.mark.parametrize(("codec", "ratio", "expected"), [("topk", 0.05, "xor"), ("int8", 0.0, "int8")])
def test_a_head_of_class_means_goes_whole_or_to_the_bit_to_who_has_none(tmp_path, codec, ratio, expected):
    """A twentieth of a head is none: a job with topk down ended at an accuracy of 0.36 where others came to 0.88."""
    sender = Sender(tmp_path, down_codec=codec, down_ratio=ratio)
    sender.settings = msgspec.structs.replace(sender.settings, head_start="class-mean")
    sender.start().downlink.holds("d", sender.digest(0))
    assert sender.to("d", 2).down_codec == expected
    sender.downlink.holds("d", sender.digest(1))
    assert sender.to("d", 2).down_codec == codec


def test_a_difference_may_build_on_a_replica_and_comes_closer_each_time(tmp_path):
    sender = Sender(tmp_path, down_codec="topk", down_ratio=0.3)
    sender.downlink.holds("d", sender.digest(0))
    first = sender.to("d", 1)
    sender.downlink.worked_from("d", 1)
    second = sender.to("d", 2)
    assert second.reference == first.adapter_sha256
    start = sender.downlink.replica(1, first.adapter_sha256)
    made = load(apply_delta(make_codec("topk", 0.3), sender.content(second), start))
    far = np.abs(start["w"] - version_of(2)["w"]).sum()
    assert np.abs(made["w"] - version_of(2)["w"]).sum() < far / 2


def test_who_is_at_work_on_a_replica_is_offered_the_same_again_also_after_a_restart(tmp_path):
    sender = Sender(tmp_path, down_codec="int8")
    sender.downlink.holds("d", sender.digest(0))
    first = sender.to("d", 1)
    sender.start().downlink.holds("d", first.adapter_sha256)
    again = sender.to("d", 1)
    assert (again.adapter_sha256, again.is_exact, again.reference) == (first.adapter_sha256, False, "")
    assert to_bytes(sender.downlink.replica(1, again.adapter_sha256)) == sender.content(again)


@pytest.mark.parametrize("held", ["", "0" * 64, "nonsense/../x"])
def test_an_adapter_that_is_not_known_is_no_ground_for_a_difference(tmp_path, held):
    sender = Sender(tmp_path, down_codec="int8")
    sender.downlink.holds("d", held)
    assert sender.to("d", 2) == sender.to("nobody", 2)


def test_what_the_codec_cannot_hold_goes_to_the_bit(tmp_path, caplog):
    sender = Sender(tmp_path, down_codec="fp16")
    sender.add(3, {**first_adapter(), "b": np.array(1e6, np.float32)})
    sender.downlink.holds("d", sender.digest(0))
    download = sender.to("d", 3)
    assert (download.down_codec, download.is_exact) == ("xor", True)
    assert opened(sender, download, 0) == sender.ledger.version(3)
    assert "65504" in caplog.text


def test_evaluating_devices_measure_the_version_itself(tmp_path):
    for codec, expected in (("int8", "xor"), ("xor", "xor"), ("whole", "full")):
        sender = Sender(tmp_path / codec, down_codec=codec)
        sender.downlink.holds("d", sender.digest(0))
        download = sender.to("d", 1, exactly=True)
        assert (download.down_codec, download.is_exact) == (expected, True)


def test_few_replicas_stand_for_a_version_and_old_ones_go(tmp_path):
    sender = Sender(tmp_path, down_codec="int8")
    for i in range(8):
        sender.downlink._replicas.keep(0, to_bytes(version_of(10 + i)))
    held = sorted(digest for _, digest in sender.downlink._replicas._kept)
    for i, digest in enumerate(held):
        sender.downlink.holds(f"d{i}", digest)
    offers = [sender.to(f"d{i}", 2) for i in range(8)]
    assert sorted((o.down_codec, o.is_exact) for o in offers) == [("int8", False)] * 4 + [("xor", True)] * 4
    for i in range(8):
        sender.downlink.worked_from(f"d{i}", 2)
    sender.downlink.close(4)
    kept = sorted(path.name[:5] for path in (tmp_path / "replicas").iterdir())
    assert kept == ["00002"] * 4
    sender.downlink.holds("d0", "")
    sender.downlink.close(5)
    assert len(list((tmp_path / "replicas").iterdir())) == 3, "nobody holds it"


def test_a_replica_of_another_version_is_no_ground_for_an_update(tmp_path):
    sender = Sender(tmp_path, down_codec="int8")
    sender.downlink.holds("d", sender.digest(0))
    digest = sender.to("d", 1).adapter_sha256
    with pytest.raises(WireError, match=f"adapter '{digest[:12]}', which does not stand for version 2"):
        sender.downlink.replica(2, digest)


def test_a_version_that_the_codec_cannot_tell_from_the_one_before_still_stands_for_itself(tmp_path):
    sender = Sender(tmp_path, down_codec="fp16")
    sender.downlink.holds("d", sender.digest(0))
    sender.to("d", 1)
    sender.downlink.worked_from("d", 1)
    replica = sender.downlink.replica(1, sender.downlink._holdings.adapter("d"))
    for number, step in ((3, 1e-8), (4, 2e-8)):
        near_zero = np.abs(replica["w"]) < 0.01
        moved = np.where(near_zero, replica["w"] + np.float32(step), replica["w"])
        sender.add(number, {**replica, "w": moved})
        download = sender.to("d", number)
        assert not download.is_exact
        sender.downlink.worked_from("d", number)
        sender.downlink.replica(number, download.adapter_sha256)


def test_a_damaged_replica_is_not_used(tmp_path):
    replicas = Replicas(tmp_path / "r")
    digest = sha256(b"content").hexdigest()
    replicas.keep(1, b"content")
    assert replicas.content(digest) == b"content"
    (file,) = (tmp_path / "r").iterdir()
    file.write_bytes(b"contend")
    assert replicas.content(digest) is None
    assert not replicas.stands_for(1, digest)
    assert Replicas(tmp_path / "r").content(digest) is None


def test_a_replica_that_cannot_be_written_is_not_offered(tmp_path):
    sender = Sender(tmp_path, down_codec="int8")
    (tmp_path / "replicas").write_bytes(b"a file in its place")
    sender.downlink.holds("d", sender.digest(0))
    with pytest.raises(StateError, match="cannot be written"):
        sender.to("d", 1)


def test_what_is_not_offered_is_not_served(tmp_path):
    sender = Sender(tmp_path)
    with pytest.raises(WireError, match="not offered"):
        sender.downlink.chunks("nobody", Request(sha256="0" * 64, missing=b"\1"))


@pytest.mark.parametrize(("codec", "error"), [("zip", UnknownName), ("topk", ConfigError)])
def test_an_unknown_down_codec_or_no_ratio_is_refused(tmp_path, codec, error):
    with pytest.raises(error):
        Sender(tmp_path, down_codec=codec)


def task_from(version, settings):
    return Task("t", "d", "train", version + 1, version, 0, settings.work)


def test_an_update_from_a_replica_moves_the_version_as_far_as_the_replica(tmp_path):
    settings = settings_of(down_codec="topk", down_ratio=0.01, codec="int8")
    ledger = Ledger(tmp_path, settings)
    ledger.add_version(0, to_bytes(first_adapter()), round_number=0)
    ledger.add_version(1, to_bytes(version_of(1)), round_number=1)
    versions = Versions(ledger, settings, first_adapter())
    versions.downlink.holds("d", sha256(ledger.version(0)).hexdigest())
    digest = versions.downlink.offer("d", 1, **CHUNKS).adapter_sha256
    replica = versions.downlink.replica(1, digest)
    far = np.abs(replica["w"] - version_of(1)["w"]).max()
    assert far > 0.01, "topk left much behind"
    moved = {"w": replica["w"] + np.where(np.arange(3000) % 2, np.float32(0.001), 0)}
    update = pack(make_codec("int8"), moved, replica, reference_sha256=digest)
    versions.add(task_from(1, settings), update.payload, 7)
    versions.close(2, 2)
    expected = version_of(1)["w"] + np.where(np.arange(3000) % 2, 0.001, 0)
    np.testing.assert_allclose(load(ledger.version(2))["w"], expected, atol=1e-5)


def test_an_update_from_what_nobody_was_offered_is_refused(tmp_path):
    settings = settings_of(down_codec="int8")
    versions = Versions(Ledger(tmp_path, settings), settings, first_adapter())
    stray = pack(make_codec("fp32"), first_adapter(), first_adapter(), reference_sha256="f" * 64)
    with pytest.raises(WireError, match="adapter 'ffffffffffff', which does not stand for version 0"):
        versions.add(task_from(0, settings), stray.payload, 7)


def test_evaluations_are_of_the_version_and_not_of_a_replica(tmp_path):
    done = world(tmp_path, down_codec="topk", down_ratio=0.05, evaluate=True).run()
    for row in rows(done.aggregator.ledger):
        exact = workbench_of(9).evaluate(None, load(done.aggregator.version(row.round)))
        assert row.loss == exact.loss


def test_only_replicas_of_the_last_versions_are_kept(tmp_path):
    done = world(tmp_path, numbers=(0, 1), down_codec="int8", rounds=6).run()
    kept = {path.name[:5] for path in (done.aggregator.folder / "replicas").iterdir()}
    assert kept == {"00004", "00005"}, "version 6 is offered to nobody"


def down_bytes(done):
    return [row.bytes_down for row in rows(done.aggregator.ledger)]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_lossless_downlink_changes_no_bit_and_costs_less(tmp_path, seed):
    done = world(tmp_path, down_codec="xor", seed=seed).run()
    assert done.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())
    whole = len(done.aggregator.version(0))
    assert 0 < down_bytes(done)[2] < 4 * whole
    assert not (tmp_path / "aggregator" / "replicas").exists()


@pytest.mark.parametrize(("codec", "ratio"), [("fp16", 0.0), ("int8", 0.0), ("topk", 0.2)])
def test_a_lossy_downlink_comes_close_whatever_the_order_of_arrival(tmp_path, codec, ratio):
    runs = [
        world(tmp_path / str(seed), down_codec=codec, down_ratio=ratio, seed=seed).run() for seed in (0, 1, 2)
    ]
    first, *others = (run.aggregator.version(3) for run in runs)
    assert all(other == first for other in others)
    exact = load(in_process(FOUR, rounds=3, settings=settings_of()))
    np.testing.assert_allclose(load(first)["w"], exact["w"], atol=2e-4)
    assert down_bytes(runs[0])[2] < 4 * len(first) / 1.5


@pytest.mark.parametrize(
    ("codec", "ratio", "bits", "far"),
    [("caesar", 0.5, 16, 2e-2), ("caesar-sign", 0.5, 0, 5e-2), ("quant", 0.0, 8, 2e-4)],
)
def test_a_recovered_start_is_the_same_on_both_sides(tmp_path, codec, ratio, bits, far):
    settings = {"down_codec": codec, "down_ratio": ratio, "down_bits": bits}
    log = []
    running = world(
        tmp_path, disturb=lambda topic, payload: log.append((topic, payload)) or (payload,), **settings
    )
    running.run()
    offers = [offer for _, offer in spoken(log, Offer) if offer.role == "train" and offer.version]
    assert {(o.down_codec, o.down_ratio, o.down_bits) for o in offers} == {(codec, ratio, bits)}
    assert not any(offer.is_exact for offer in offers)
    exact = load(in_process(FOUR, rounds=3, settings=settings_of()))
    found = load(running.aggregator.version(3))
    np.testing.assert_allclose(found["w"], exact["w"], atol=far)
    assert down_bytes(running)[2] < 4 * len(running.aggregator.version(3)) / 1.4


def test_a_lossy_downlink_survives_the_death_of_everyone(tmp_path):
    quiet = world(tmp_path / "quiet", down_codec="int8").run()
    running = world(tmp_path / "killed", down_codec="int8")
    running.die_together(14, 3, 5)
    running.run()
    assert running.aggregator.version(3) == quiet.aggregator.version(3)


def test_updates_from_replicas_are_folded_again_after_a_restart(tmp_path):
    quiet = world(tmp_path / "quiet", numbers=(0, 1), down_codec="int8").run()
    running = world(tmp_path / "killed", numbers=(0, 1), down_codec="int8")
    running.run(until=lambda: running.aggregator.service.federation.version == 1)
    running.devices[1].kill()
    running.run(until=lambda: "train-2-device-0" in running.aggregator.ledger.past().accepted)
    running.aggregator.kill()
    running.aggregator.start(running.now)
    running.devices[1].start()
    running.run()
    assert running.devices[0].kinds().count("trained") == 3
    assert running.aggregator.version(3) == quiet.aggregator.version(3)


def test_a_device_that_lost_its_state_gets_the_whole(tmp_path):
    running = world(tmp_path, numbers=(0, 1), down_codec="xor")
    running.run(until=lambda: running.aggregator.service.federation.version == 2)
    device = running.devices[1]
    device.kill()
    (device.folder / "adapter.safetensors").unlink()
    device.start()
    running.run()
    assert running.aggregator.version(3) == in_process((0, 1), rounds=3, settings=settings_of())


def test_a_device_that_knows_no_differences_takes_part(tmp_path):
    running = world(tmp_path, numbers=(0, 1), down_codec="int8")
    publish = running.devices[0].link.publish

    def of_0_1_0(topic, payload, **how):
        fields = msgspec.msgpack.decode(payload)
        fields.pop("holds", None)
        publish(topic, msgspec.msgpack.encode(fields), **how)

    running.devices[0].link.publish = of_0_1_0
    offers = []
    running.server.disturb = lambda topic, payload: offers.append((topic, payload)) or (payload,)
    running.run()
    old = [offer for topic, offer in spoken(offers, Offer) if "device-0" in topic]
    assert {offer.down_codec for offer in old} == {"full"}
    assert {offer.is_exact for offer in old} == {True}


def test_lost_doubled_and_damaged_messages_change_no_bit_of_a_lossless_downlink(tmp_path):
    done = world(tmp_path, disturb=roughly(3), down_codec="xor").run(turns=20_000)
    assert done.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())


def test_each_device_is_served_in_its_own_way_also_when_many_were_offered_something_since(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(downlink, "_SHELF_BYTES", 0)
    sender = Sender(tmp_path, traffic="caesar", clients=9)
    offered = {}
    for place in range(9):
        sender.downlink.holds(f"d{place}", sender.digest(0))
        packing = Packing("topk", 0.1 + place / 20)
        offered[f"d{place}"] = packing, sender.to(f"d{place}", 2, packing=packing)
    for device, (packing, download) in offered.items():
        assert (download.down_codec, download.down_ratio) == ("topk", packing.ratio), "a replica for each"
        request = Request(sha256=download.adapter.sha256, missing=b"\1")
        (chunk,) = sender.downlink.chunks(device, request)
        assert len(chunk.data) == download.adapter.size_bytes
        assert sender.downlink.sizes(device, request).total == download.adapter.size_bytes
    first = offered["d0"][1].adapter.sha256
    for place in range(1, 9):
        sender.to(f"d{place}", 2, packing=offered[f"d{place}"][0])
    with pytest.raises(WireError, match="which is not offered"):
        sender.downlink.chunks("d8", Request(sha256=first, missing=b"\1"))
    assert list(sender.downlink.chunks("d0", Request(sha256=first, missing=b"\1")))


@pytest.mark.parametrize(
    ("fitting", "differences"), [(0.5, 2), (5.5, 3), (9, 4)], ids=["the least", "as many fit", "the most"]
)
def test_differences_to_the_bit_are_taken_from_so_many_adapters_that_none_is_made_anew_for_each_chunk(
    tmp_path, monkeypatch, fitting, differences
):
    size = len(to_bytes(version_of(0)))
    monkeypatch.setattr(downlink, "_SHELF_BYTES", int(fitting * size))
    monkeypatch.setattr(downlink, "_BASES_MIN", 2)
    monkeypatch.setattr(downlink, "_BASES_MAX", 4)
    sender = Sender(tmp_path, clients=6)
    for number in range(3, 8):
        sender.add(number, version_of(number))
    for place in range(1, 7):
        sender.downlink.holds(f"d{place}", sender.digest(place))
    codecs = [sender.to(f"d{place}", 7).down_codec for place in range(1, 7)]
    assert codecs == ["xor"] * differences + ["full"] * (6 - differences)
    ready = [key for key in sender.downlink._shelf if key.version == 7]
    assert len(ready) == differences + 1, "all who get the whole share it"
    assert sender.downlink._shelf_bytes == sum(len(one.payload) for one in sender.downlink._shelf.values())
    sender.downlink.holds("late", sender.digest(6), original=sender.digest(0))
    assert sender.to("late", 7).reference == sender.digest(0)


def test_so_many_replicas_stand_for_a_version_that_none_is_made_anew_for_each_chunk(tmp_path, monkeypatch):
    sender = Sender(tmp_path, clients=6, down_codec="int8")
    for number in range(3, 8):
        sender.add(number, version_of(number))
    sender.downlink.holds("d", sender.digest(1))
    payload = sender.to("d", 7).adapter.size_bytes
    monkeypatch.setattr(downlink, "_SHELF_BYTES", 5 * payload + 100)
    for place in range(2, 7):
        sender.downlink.holds(f"d{place}", sender.digest(place))
    found = [sender.to(f"d{place}", 7) for place in range(2, 7)]
    assert [one.down_codec for one in found] == ["int8"] * 4 + ["xor"]


def test_a_mask_rides_behind_what_a_planner_packs_and_counts_as_positions(tmp_path):
    sender, mask = Sender(tmp_path, traffic="caesar", clients=9), bytes(range(1, 101))
    for place in range(9):
        sender.downlink.holds(f"d{place}", sender.digest(0), "" if place else sha256(mask).hexdigest())
    offered = [
        sender.to(f"d{place}", 2, packing=Packing("topk", 0.1 + place // 2 / 20), mask=mask)
        for place in range(9)
    ]
    assert {download.mask_sha256 for download in offered} == {sha256(mask).hexdigest()}
    assert [download.mask_bytes for download in offered] == [0, *[len(mask)] * 8]
    plain, masked = (
        sender.downlink.sizes(f"d{n}", Request(sha256=offered[n].adapter.sha256, missing=b"\1"))
        for n in (0, 1)
    )
    assert masked.total == offered[1].adapter.size_bytes
    assert masked.positions == plain.positions + len(mask)
    assert (masked.values, masked.scales, masked.protocol) == (plain.values, plain.scales, plain.protocol)
    for place, download in enumerate(offered):
        request = Request(sha256=download.adapter.sha256, missing=b"\1")
        (chunk,) = sender.downlink.chunks(f"d{place}", request)
        assert chunk.data.endswith(mask) == (place > 0)
    sender.downlink.worked_from("d1", 2)
    assert sender.to("d1", 1, packing=Packing("fp16"), mask=mask).mask_bytes == 0


@pytest.mark.parametrize("traffic", ["caesar", "fixed"])
def test_what_an_absent_device_holds_is_kept(tmp_path, traffic):
    sender = Sender(tmp_path, traffic=traffic, down_codec="full" if traffic == "caesar" else "int8")
    packing = Packing("int8") if traffic == "caesar" else None
    sender.downlink.holds("away", sender.digest(0))
    held = sender.to("away", 1, packing=packing)
    assert not held.is_exact
    sender.downlink.worked_from("away", 1)
    for number in range(3, 53):
        sender.add(number, version_of(number))
        sender.downlink.close(number)
    back = sender.to("away", 52, packing=packing)
    assert (back.reference, back.down_codec) == (held.adapter_sha256, "int8")


def test_a_device_that_says_hello_while_it_fetches_gets_smaller_chunks_and_larger_ones_when_it_has_all(
    tmp_path,
):
    sender = Sender(tmp_path)
    sizes = []
    for _ in range(8):
        download = sender.to("a", 1)
        sizes.append(download.adapter.chunk_bytes)
        list(sender.downlink.chunks("a", Request(sha256=download.adapter.sha256, missing=b"\1", limit=1)))
        sender.downlink.holds("a", "")
    assert sizes == [CHUNK_BYTES // 2**n for n in (0, 1, 2, 3, 4, 5, 5, 5)]
    assert sender.to("b", 1).adapter.chunk_bytes == CHUNK_BYTES, "another device's stay as they are"
    sender.downlink.worked_from("a", 1)
    sender.downlink.holds("a", "")
    assert sender.to("a", 1).adapter.chunk_bytes == CHUNK_BYTES // 16
    assert sender.downlink.has_smaller("b", CHUNK_BYTES // 2)
    assert not sender.downlink.has_smaller("b", CHUNK_BYTES)


def test_large_transfers_of_old_versions_make_room_and_are_made_ready_anew_for_who_still_fetches_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(downlink, "_SHELF_BYTES", 1)
    sender = Sender(tmp_path, clients=2, down_codec="whole")
    old = sender.to("d", 1)
    sender.downlink.close(2)
    sender.to("e", 2)
    assert {key.version for key in sender.downlink._shelf} == {2}
    assert sender.downlink._shelf_bytes == sum(len(one.payload) for one in sender.downlink._shelf.values())
    assert list(sender.downlink.chunks("d", Request(sha256=old.adapter.sha256, missing=b"\1")))


@pytest.mark.parametrize(("limit", "held"), [(1, 1), (2**20, versions_module._REFERENCES)])
def test_few_large_versions_are_held_decoded(monkeypatch, limit, held):
    monkeypatch.setattr(versions_module, "_REFERENCE_BYTES", limit)
    versions = Versions(MemoryStore(), settings_of(rounds=9), first_adapter())
    for number in range(1, 7):
        versions.close(number, number)
    assert [*versions._references] == [*range(7)][-held:]
    assert to_bytes(versions.reference(2)) == to_bytes(first_adapter())
    assert len(versions._references) == held
