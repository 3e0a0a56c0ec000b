"""Every byte by device, direction and kind: sums are those of the links, whatever is lost, doubled or cut off."""

import numpy as np
import pytest
from fleet import first_adapter, roughly, world

from fleetune.broker.service import freight
from fleetune.broker.service.freight import DOWN, UP, Freight, parted, sizes_of_file, sizes_of_update
from fleetune.broker.service.meter import Meter
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.store.rows import rows
from fleetune.broker.store.store import AFTERWARDS, ByKind, Carried, in_all
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.wire import Chunk, encode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.loopback import Loopback


def sums(ledger, device, way):
    return getattr(ledger.carried()[device], way)


@pytest.mark.parametrize("seed", [None, 3])
def test_all_that_the_link_carried_is_somebody_s_and_the_data_of_chunks_are_as_before(tmp_path, seed):
    done = world(tmp_path, numbers=(0, 1), disturb=None if seed is None else roughly(seed)).run(turns=20_000)
    aggregator = done.aggregator
    aggregator.service.stop(done.now)
    carried, cost = in_all(aggregator.ledger.carried()), aggregator.ledger.cost()
    assert carried.down.total == cost.bytes_sent == aggregator.link.bytes_sent
    assert carried.up.total == aggregator.link.bytes_received
    assert carried.up.values > 0
    in_rows = [row.up.total for row in rows(aggregator.ledger)]
    last = in_all(aggregator.ledger.carried(AFTERWARDS)).up.total
    assert sum(in_rows) + last == carried.up.total
    if seed is None:
        assert set(aggregator.ledger.carried()) == {"", "device-0", "device-1"}
        for device in done.devices:
            # A status when it leaves is no message of a device that has not left.
            assert sums(aggregator.ledger, device.name, "up").total == device.link.bytes_sent


def test_an_update_of_fp32_is_values_and_its_names_and_each_goes_to_its_round(tmp_path):
    done = world(tmp_path, numbers=(0, 1), down_codec="whole").run()
    trained = {n: first_adapter()[n] for n in ("w", "b")}
    values = sum(v.nbytes for v in trained.values())
    payload = len(encode_update("fp32", trained, first_adapter()))
    whole = to_bytes(first_adapter())
    for row in rows(done.aggregator.ledger)[1:]:
        assert row.up.values == 2 * values
        assert row.up.protocol > 2 * (payload - values)
        assert row.down.values == (
            2 * sum(v.nbytes for v in first_adapter().values()) if row.round > 1 else 0
        )
        assert row.up.positions == row.up.scales == 0
    assert sizes_of_file(whole).protocol == len(whole) - sum(v.nbytes for v in first_adapter().values())


@pytest.mark.parametrize("codec", ["topk", "quant", "caesar"])
def test_positions_and_scales_of_updates_are_told_apart(tmp_path, codec):
    ratio = 0.0 if codec == "quant" else 0.25
    work = LocalWork(steps=4, codec=codec, codec_ratio=ratio)
    done = world(tmp_path, numbers=(0, 1), work=work).run()
    (_, *made) = rows(done.aggregator.ledger)
    for row in made:
        assert row.up.values > 0
        assert (row.up.positions > 0) == (codec != "quant")
        assert row.up.values + row.up.positions + row.up.scales < row.bytes_up < row.up.total
    payloads = done.aggregator.ledger.cost().bytes_up
    assert payloads == sum(row.bytes_up for row in made)


def test_a_transfer_is_parted_exactly_repeated_or_cut_off():
    sizes = ByKind(values=70, positions=13, scales=10, protocol=7)
    assert parted(100, sizes) == sizes
    assert parted(300, sizes) == ByKind(values=210, positions=39, scales=30, protocol=21)
    rng = np.random.default_rng(0)
    for size in rng.integers(0, 1000, 50):
        assert parted(int(size), sizes).total == size
    assert parted(9, None) == parted(9, ByKind()) == ByKind(values=9)


@pytest.mark.parametrize(
    "payload", [b"", b"\x00", b"\xff" * 40, encode_update("fp32", first_adapter(), first_adapter())[:-5]]
)
def test_what_is_malformed_is_counted_as_values(payload):
    assert sizes_of_update(payload) == ByKind(values=len(payload))
    assert sizes_of_file(payload).total == len(payload)


def test_data_of_an_upload_wait_until_it_is_whole_or_the_round_is_over():
    counted = Freight()
    counted.message("d", UP, 130)
    counted.data("d", UP, "x", 100)
    assert counted.take(all_of_it=False) == {"d": Carried(up=ByKind(protocol=30))}
    assert counted.take(all_of_it=False) == {}
    counted.message("d", UP, 60)
    counted.data("d", UP, "x", 50)
    counted.knows("x", ByKind(values=75, positions=75))
    assert counted.take(all_of_it=False) == {"d": Carried(up=ByKind(values=75, positions=75, protocol=10))}
    counted.message("d", DOWN, 9)
    counted.data("d", DOWN, "y", 9)
    assert counted.take(all_of_it=True) == {"d": Carried(down=ByKind(values=9))}


def test_of_very_many_names_the_last_are_counted_together(monkeypatch):
    monkeypatch.setattr(freight, "DEVICES_MAX", 2)
    counted = Freight()
    for name in "abcd":
        counted.message(name, UP, 1)
    assert counted.take(all_of_it=True) == {
        "a": Carried(up=ByKind(protocol=1)),
        "b": Carried(up=ByKind(protocol=1)),
        "": Carried(up=ByKind(protocol=2)),
    }


def test_what_nobody_has_read_is_nobody_s_when_the_meter_is_closed():
    link, store = Loopback().connect(["t"]), MemoryStore()
    meter = Meter(link, store, bucket=1, now=0.0)
    link.publish("t", b"four")
    meter.sent(
        "d", Chunk(sha256="x", index=0, data=b"abc"), len(encode(Chunk(sha256="x", index=0, data=b"abc")))
    )
    link.receive(0.0)
    meter.close(1.0)
    carried = store.carried(1)
    assert carried[""] == Carried(up=ByKind(protocol=4))
    assert carried["d"].down.values == 3
