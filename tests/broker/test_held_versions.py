"""What devices hold, and what goes wrong with it: the model is the one that comes of sending every version whole."""

import shutil

import msgspec
import numpy as np
import pytest
from fleet import FOUR, Aggregator, Device, World, first_adapter, in_process, settings_of, spoken, world
from safetensors.numpy import load

from fleetune.broker.methods.strategies import STRATEGIES
from fleetune.broker.methods.strategy import Update
from fleetune.broker.service.versions import Versions
from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.codecs import make_codec, unpack
from fleetune.device_runtime.contracts.wire import Offer, Verdict
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.loopback import Loopback

SMALL = 200
FEW_BITS = {
    "work": LocalWork(steps=4, codec="quant", codec_bits=4),
    "down_codec": "quant",
    "down_bits": 8,
}


class Job:
    """Two devices, of which one may be away, and all that was offered to it."""

    def __init__(self, folder, *, numbers=(0, 1), **changes):
        self.log = []
        server = Loopback(disturb=self._tap)
        fields = {"clients": len(numbers), "min_clients": 1, "size": SMALL, **changes}
        self.aggregator = Aggregator(server, folder, **fields).start()
        places = None if fields.get("in_memory") else folder
        self.devices = [Device(server, places, n, size=SMALL).start() for n in numbers]
        self.world = World(server, self.aggregator, self.devices)

    def _tap(self, topic, payload):
        self.log.append((topic, payload))
        return (payload,)

    def until(self, version):
        self.world.run(until=lambda: self.aggregator.service.federation.version >= version)
        return self

    def restart_aggregator(self):
        self.aggregator.kill()
        self.aggregator.start(self.world.now)

    def run(self):
        self.world.run()
        return self.aggregator.version(self.aggregator.settings.rounds)

    def offers(self, device="device-1", *, since=1):
        found = [m for topic, m in spoken(self.log, Offer) if device in topic and m.role == "train"]
        return [m for m in found if m.version >= since]


def away(folder, *, meanwhile=lambda job: None, gone=(5, 55), rounds=60, **changes):
    """A job whose second device is away for 50 versions: what it is offered then, and the last version."""
    job = Job(folder, rounds=rounds, **changes).until(gone[0])
    job.devices[1].kill()
    job.until(gone[1])
    meanwhile(job)
    job.devices[1].events.append(Event("BACK", 0))
    job.devices[1].start()
    last = job.run()
    return job.offers(since=gone[1])[0], last, job


def took_part(job):
    """Whether the second device's work was accepted also after it was back."""
    kinds = job.devices[1].kinds()
    return "accepted" in kinds[kinds.index("BACK") :]


def digest_of(job, version):
    return job.aggregator.service._versions.downlink.offer("nobody", version, chunk_bytes=1000).adapter_sha256


def test_who_is_back_after_50_rounds_gets_a_difference_to_the_bit_from_the_version_that_it_holds(tmp_path):
    whole, expected, _ = away(tmp_path / "whole", down_codec="whole", in_memory=True)
    offer, last, job = away(tmp_path / "full", in_memory=True)
    assert (offer.down_codec, offer.is_exact, whole.down_codec) == ("xor", True, "full")
    held = [v for v in range(56) if digest_of(job, v) == offer.reference]
    assert held in ([4], [5]), "the one that it worked from last"
    assert offer.adapter.size_bytes < whole.adapter.size_bytes
    assert last == expected
    assert took_part(job)


def test_who_is_back_after_50_rounds_of_few_bits_gets_few_bits_from_the_replica_that_it_holds(tmp_path):
    offer, _, job = away(tmp_path, in_memory=True, **FEW_BITS)
    assert (offer.down_codec, offer.down_bits, offer.is_exact) == ("quant", 8, False)
    assert len(job.aggregator.ledger.replicas._kept) <= 4, "those of the last versions, and what it held"
    assert took_part(job)


def forget_replicas(job):
    job.restart_aggregator()
    shutil.rmtree(job.aggregator.folder / "replicas")
    job.restart_aggregator()


def test_whose_replica_is_gone_gets_the_version_to_the_bit_from_version_0(tmp_path):
    offer, _, job = away(tmp_path, meanwhile=forget_replicas, gone=(5, 12), rounds=14, **FEW_BITS)
    assert (offer.down_codec, offer.is_exact) == ("xor", True)
    assert offer.reference == digest_of(job, 0)
    assert offer.adapter_sha256 == digest_of(job, offer.version)
    assert took_part(job)


def path_of(job, version):
    return job.aggregator.folder / "versions" / f"{version:05d}.safetensors"


def damage(*versions):
    def spoil(job):
        for version in versions:
            content = bytearray(path_of(job, version).read_bytes())
            content[-1] ^= 1
            path_of(job, version).write_bytes(content)

    return spoil


def remove(*versions):
    def unlink(job):
        for version in versions:
            path_of(job, version).unlink()

    return unlink


@pytest.mark.parametrize("loss", [damage, remove])
@pytest.mark.parametrize(
    ("lost", "codec", "from_0"), [((4, 5), "xor", True), ((0, 4, 5), "full", False)], ids=["held", "and 0"]
)
def test_a_version_that_is_damaged_or_gone_is_no_ground_and_the_model_is_the_same(
    tmp_path, caplog, loss, lost, codec, from_0
):
    _, expected, _ = away(tmp_path / "whole", down_codec="whole", gone=(5, 8), rounds=10)
    offer, last, job = away(tmp_path / "full", meanwhile=loss(*lost), gone=(5, 8), rounds=10)
    assert (offer.down_codec, offer.is_exact) == (codec, True)
    assert not from_0 or offer.reference == digest_of(job, 0)
    assert last == expected
    assert "no difference is taken from version" in caplog.text
    assert took_part(job)


def test_whose_folder_is_wiped_starts_from_version_0_and_the_model_is_the_same(tmp_path):
    job = Job(tmp_path, rounds=5, min_clients=2).until(2)
    job.devices[1].kill()
    shutil.rmtree(job.devices[1].folder)
    job.devices[1].folder.mkdir()
    job.log.clear()
    job.devices[1].start()
    last = job.run()
    offer = job.offers(since=2)[0]
    assert (offer.down_codec, offer.reference) == ("xor", digest_of(job, 0))
    assert last == in_process((0, 1), rounds=5, settings=settings_of(), size=SMALL)


def test_who_skips_a_version_gets_the_difference_over_both(tmp_path):
    offer, last, job = away(tmp_path / "a", gone=(2, 4), rounds=6)
    _, expected, _ = away(tmp_path / "b", gone=(2, 4), rounds=6, down_codec="whole")
    assert offer.reference in {digest_of(job, 1), digest_of(job, 2)}
    assert offer.version >= 4
    assert last == expected


def without(*fields):
    """A device of an earlier release: its messages have no such fields."""

    def spoil(device):
        publish = device.link.publish

        def old(topic, payload, **how):
            said = msgspec.msgpack.decode(payload)
            publish(topic, msgspec.msgpack.encode({k: v for k, v in said.items() if k not in fields}), **how)

        device.link.publish = old

    return spoil


def test_devices_of_all_releases_in_one_round_make_the_same_model(tmp_path):
    job = Job(tmp_path, numbers=FOUR, min_clients=4, rounds=4)
    without("holds", "original")(job.devices[0])
    without("original")(job.devices[1])
    last = job.run()
    codecs = [{offer.down_codec for offer in job.offers(f"device-{n}")} for n in FOUR]
    assert codecs == [{"full"}, {"xor"}, {"xor"}, {"xor"}]
    assert last == in_process(FOUR, rounds=4, settings=settings_of(), size=SMALL)


def test_a_device_that_does_not_say_that_it_has_version_0_gets_the_whole_where_what_it_holds_is_gone(
    tmp_path,
):
    def old(job):
        forget_replicas(job)
        start = job.devices[1].start

        def started():
            start()
            without("original")(job.devices[1])

        job.devices[1].start = started

    offer, _, _ = away(tmp_path, meanwhile=old, gone=(5, 8), rounds=10, **FEW_BITS)
    assert (offer.down_codec, offer.is_exact) == ("full", True)


def test_updates_in_codecs_of_their_own_in_one_round_are_averaged_as_they_decode(tmp_path, monkeypatch):
    heard, add = {}, Versions.add

    def hear(self, task, content, num_samples):
        add(self, task, content, num_samples)
        heard.setdefault(task.round, []).append((task, content, num_samples))

    monkeypatch.setattr(Versions, "add", hear)
    sizes = {"num_elements": SMALL + 7, "num_classes": 3}
    job = Job(tmp_path, numbers=FOUR, min_clients=4, rounds=4, traffic="prowd-like", **sizes)
    job.run()
    mixed = 0
    for number, updates in heard.items():
        before, strategy = load(job.aggregator.version(number - 1)), STRATEGIES["fedavg"]()
        sums = strategy.init(before)
        for task, content, num_samples in updates:
            how = task.work.codec, task.work.codec_ratio, task.work.codec_bits
            sums = strategy.add(
                sums, Update(unpack(make_codec(*how), content, before).values, before, num_samples)
            )
        assert job.aggregator.version(number) == to_bytes(strategy.finish(sums, before, {})[0])
        mixed += len({task.work.codec_bits for task, _, _ in updates}) > 1
    assert mixed >= 2


def killed_when(device, running, kind, count):
    """Kill a device at the moment of its ``count``-th event of this kind, and start it again."""
    running.run(until=lambda: device.kinds().count(kind) >= count)
    device.kill()
    device.start()


@pytest.mark.parametrize("job", [{}, FEW_BITS], ids=["exact", "few bits"])
@pytest.mark.parametrize("kind", ["offer", "trained", "accepted"])
def test_a_device_killed_between_encoding_and_acknowledgement_changes_no_bit(tmp_path, job, kind):
    quiet = world(tmp_path / "quiet", numbers=(0, 1), **job).run()
    running = world(tmp_path / "killed", numbers=(0, 1), **job)
    for count in (1, 2, 3):
        killed_when(running.devices[1], running, kind, count)
    running.run()
    assert running.aggregator.version(3) == quiet.aggregator.version(3)


def test_a_device_killed_between_encoding_and_its_outbox_owes_no_error_twice(tmp_path, monkeypatch):
    """What the codec owes is kept before the update is: it is packed again from what earlier rounds left."""
    quiet = world(tmp_path / "quiet", numbers=(0, 1), **FEW_BITS).run()
    running = world(tmp_path / "killed", numbers=(0, 1), **FEW_BITS)
    device = running.devices[1]
    running.run(until=lambda: device.kinds().count("accepted") == 1)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(device.outbox, "put", fail)
    with pytest.raises(KeyboardInterrupt):
        running.run()
    monkeypatch.undo()
    device.kill()
    device.start()
    running.run()
    assert running.aggregator.version(3) == quiet.aggregator.version(3)


@pytest.mark.parametrize("job", [{}, FEW_BITS], ids=["exact", "few bits"])
def test_an_aggregator_killed_between_keeping_an_update_and_its_verdict_counts_it_once(tmp_path, job):
    quiet = world(tmp_path / "quiet", numbers=(0, 1), **job).run()
    running = world(tmp_path / "killed", numbers=(0, 1), **job)
    for number in (1, 2, 3):
        outbound = running.aggregator.service._outbound

        def tell(device_id, message, tell=outbound.tell):
            if isinstance(message, Verdict):
                raise KeyboardInterrupt
            return tell(device_id, message)

        outbound.tell = tell
        with pytest.raises(KeyboardInterrupt):
            running.run()
        running.aggregator.kill()
        running.aggregator.start(running.now)
        running.run(until=lambda number=number: running.aggregator.service.federation.version >= number)
    running.run()
    assert running.aggregator.version(3) == quiet.aggregator.version(3)


def test_the_model_of_few_bits_is_near_that_of_all(tmp_path):
    done = world(tmp_path, numbers=(0, 1), **FEW_BITS).run()
    exact = load(in_process((0, 1), rounds=3, settings=settings_of()))
    moved = np.linalg.norm(exact["w"] - first_adapter()["w"])
    assert np.linalg.norm(load(done.aggregator.version(3))["w"] - exact["w"]) < 0.3 * moved
