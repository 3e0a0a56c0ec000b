"""A federation whose first round is for the head: kills, bad updates and devices that cannot, over the loopback."""

import logging

import msgspec
import numpy as np
import pytest
from fleet import (
    FOUR,
    STEPS,
    Aggregator,
    Device,
    LinearTraining,
    World,
    first_adapter,
    points_of,
    spoken,
    workbench_of,
)
from safetensors.numpy import load

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.work import device_seed
from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.strategy import Update
from fleetune.broker.service.choices import choices, replay
from fleetune.broker.store.rows import rows
from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.local_run import LocalRun
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, ClassHead
from fleetune.device_runtime.contracts.wire import Offer
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.class_means import class_mean_head
from fleetune.device_runtime.network.loopback import Loopback

HEAD = ClassHead("head.weight", "head.bias")
CLASSES, WIDTH = 3, 4


def adapter():
    head = {"head.weight": np.ones((CLASSES, WIDTH), np.float32), "head.bias": np.ones(CLASSES, np.float32)}
    return {**first_adapter(), **head}


def sums_of(number):
    """Of a device's samples, as many as it says it has; device 3 has only one class."""
    rng = np.random.default_rng(number)
    labels = rng.integers(0, CLASSES, 5 + number) if number != 3 else np.full(8, 2)
    features, is_of = rng.normal(size=(len(labels), WIDTH)) + labels[:, None], np.eye(CLASSES)[labels]
    found = {SUMS: is_of.T @ features, COUNTS: is_of.sum(0), SQUARES: is_of.T @ np.square(features).sum(1)}
    return {name: np.float64(np.float32(value)) for name, value in found.items()}


def workbench(number, sums=None):
    """The higher its number, the slower the device."""
    stats = {"seconds": 1.0 + 20 * number, "samples": 8.0}
    return workbench_of(number)._replace(class_sums=lambda work, held: (sums or sums_of(number), stats))


def world(folder, *, numbers=FOUR, benches=None, disturb=None, **changes):
    server = Loopback(disturb=disturb)
    changes = {
        "clients": len(numbers),
        "min_clients": len(numbers),
        "head_start": "class-mean",
        "head": HEAD,
        **changes,
    }
    aggregator = Aggregator(server, folder, adapter=adapter(), **changes).start()
    first = FirstAdapter.of(adapter())
    benches = benches or {}
    devices = [
        Device(server, folder, n, workbench=benches.get(n, workbench(n)), adapter=first).start()
        for n in numbers
    ]
    return World(server, aggregator, devices)


def head_of(numbers):
    pooled = {name: sum(sums_of(n)[name] for n in numbers) for name in (SUMS, COUNTS, SQUARES)}
    return class_mean_head(pooled, HEAD)


def assert_head(done, version, numbers=FOUR):
    found = load(done.aggregator.version(version))
    for name, wanted in head_of(numbers).items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-5 * np.abs(wanted).max())


def trained(rounds, numbers=FOUR):
    """``w`` after so many rounds that train, computed directly."""
    now = adapter()
    for number in range(1, rounds + 1):
        sums = fedavg().init(now)
        for position, device in enumerate(numbers):
            work = LocalWork(steps=STEPS, seed=device_seed(0, round_number=number, position=position))
            training = LinearTraining(points_of(device), work, dict(now))
            while not training.done:
                training.step()
            values = {n: np.float64(training.adapter[n]) for n in ("w", "b")}
            sums = fedavg().add(sums, Update(values, now, len(training.points[0])))
        now = fedavg().finish(sums, now, {})[0]
    return now["w"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_first_version_has_the_head_of_all_data_and_the_rounds_after_it_train(tmp_path, in_memory):
    done = world(tmp_path, in_memory=in_memory, strategy="fedavgm", rounds=1).run()
    assert_head(done, 1)
    first, made = adapter(), load(done.aggregator.version(1))
    assert all(made[name].tobytes() == first[name].tobytes() for name in first_adapter()), (
        "nothing else moves"
    )


def test_training_goes_on_from_it_with_the_draws_of_a_job_without(tmp_path):
    done = world(tmp_path, in_memory=True).run()
    assert_head(done, 3)
    assert load(done.aggregator.version(3))["w"].tobytes() == trained(2).tobytes()
    assert [d.kinds().count("summed") for d in done.devices] == [1, 1, 1, 1]
    assert [d.kinds().count("trained") for d in done.devices] == [2, 2, 2, 2]


def test_a_lossy_downlink_sends_the_new_head_to_the_bit(tmp_path):
    """As ``topk`` sends it most rows would be those of before."""
    running, heard = world(tmp_path, numbers=(0, 1), down_codec="topk", down_ratio=0.001), []
    running.server.disturb = lambda topic, payload: (heard.append((topic, payload)), (payload,))[1]
    running.run()
    offers = [offer for _, offer in spoken(heard, Offer) if offer.role == "train"]
    assert {offer.is_exact for offer in offers if offer.version == 1} == {True}
    assert {offer.is_exact for offer in offers if offer.version == 2} == {False}


def test_its_row_says_how_many_devices_and_no_loss(tmp_path):
    found = rows(world(tmp_path).run().aggregator.ledger)
    assert [row.devices for row in found] == [0, 4, 4, 4]
    assert [row.train_loss is None for row in found] == [True, True, False, False]
    assert found[1].bytes_up < found[2].bytes_up / 10


@pytest.mark.parametrize("turns", [2, 3, 4, 6])
def test_a_killed_aggregator_goes_on_with_the_same_sums(tmp_path, turns):
    running = world(tmp_path)
    for _ in range(turns):
        running.turn()
    running.aggregator.kill()
    running.aggregator.start(running.now)
    running.run()
    undisturbed = world(tmp_path / "undisturbed").run()
    assert running.aggregator.version(1) == undisturbed.aggregator.version(1)
    assert running.aggregator.version(3) == undisturbed.aggregator.version(3)


def test_an_update_accepted_before_the_kill_is_in_the_head_though_its_device_never_comes_back(tmp_path):
    running = world(tmp_path, numbers=(0, 1), rounds=1)
    late = running.devices[1]
    running.run(until=lambda: "offer" in late.kinds())
    late.kill()
    running.run(until=lambda: "accepted" in running.devices[0].kinds())
    running.devices[0].kill()
    running.aggregator.kill()
    running.aggregator.start(running.now)
    late.start()
    running.run()
    assert_head(running, 1, (0, 1))


@pytest.mark.parametrize("turns", [2, 3, 4])
def test_a_killed_device_sums_again(tmp_path, turns):
    running = world(tmp_path, rounds=1)
    for _ in range(turns):
        running.turn()
    running.devices[2].kill()
    running.turn()
    running.devices[2].start()
    assert_head(running.run(), 1)


def spoiled(**changes):
    return {**sums_of(1), **changes}


BAD = {
    "counts that are not whole": (spoiled(**{COUNTS: sums_of(1)[COUNTS] + 0.5}), "negative or not whole"),
    "more samples than it has": (
        {SUMS: sums_of(1)[SUMS], **{name: 1000 * sums_of(1)[name] for name in (COUNTS, SQUARES)}},
        "6000 samples with a class, of 6",
    ),
    "another shape": (
        {name: value[:2] for name, value in sums_of(1).items()},
        "shape [2, 4], expected [3, 4]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_refused_with_a_verdict_and_the_round_goes_on(tmp_path, case):
    sums, said = BAD[case]
    done = world(tmp_path, benches={1: workbench(1, sums)}, min_clients=3, rounds=1).run()
    assert said in verdict_on(done, 1)
    assert_head(done, 1, (0, 2, 3))


def verdict_on(done, number):
    """Why the update of a device was refused; the job may end before its verdict is heard."""
    done.turn()
    return next(event.text for event in done.devices[number].events if event.kind == "refused")


def test_a_device_that_knows_nothing_of_it_trains_and_is_refused(tmp_path, monkeypatch):
    """One of a release before: it skips the field, and sends an adapter."""
    real = LocalRun._sum

    def run_of_before(run):
        if run._home.identity.device_id != "device-1":
            return real(run)
        work = msgspec.structs.replace(run._offer.work, learns="adapter")
        run._offer = msgspec.structs.replace(run._offer, work=work)
        return run._train()

    monkeypatch.setattr(LocalRun, "_sum", run_of_before)
    done = world(tmp_path, min_clients=3, rounds=1).run()
    assert "bytes; expected 0 to 961" in verdict_on(done, 1)
    assert_head(done, 1, (0, 2, 3))


def test_a_device_that_cannot_declines_with_the_reason(tmp_path, caplog):
    def cannot(work, held):
        raise ConfigError("this head is not linear in head.weight: it cannot begin with class means")

    benches = {0: workbench_of(0), 2: workbench_of(2)._replace(class_sums=cannot)}
    with caplog.at_level(logging.WARNING):
        done = world(
            tmp_path, benches=benches, min_clients=2, rounds=1, patience=Patience(deadline_s=30)
        ).run()
    assert "device-0 declined: this device makes no class sums" in caplog.text
    assert "device-2 declined: this head is not linear" in caplog.text
    assert_head(done, 1, (1, 3))


def test_choices_begin_after_it_and_a_device_that_declined_it_may_do_all_of_them(tmp_path):
    """Killed after the round for the head, an aggregator chooses as one that was not, and as its ledger has it."""
    settings = {"configurator": "auto", "num_layers": 4, "rounds": 4, "min_clients": 2}
    benches = {0: workbench_of(0)}

    def run(folder, *, is_killed):
        playing = world(
            folder, numbers=(0, 1, 2), benches=benches, patience=Patience(deadline_s=30), **settings
        )
        if is_killed:
            playing.run(until=lambda: playing.aggregator.ledger.newest == 1)
            playing.aggregator.kill()
            playing.aggregator.start(playing.now)
        ledger = playing.run().aggregator.ledger
        again = list(replay(ledger, playing.aggregator.settings))
        assert {task.round for task, _ in again} == {2, 3, 4}
        assert all((made.work, made.reason) == (task.work, task.reason) for task, made in again)
        assert rows(ledger)[1].arms == {"class-means": 2}
        return [(one.round, one.device, one.arm) for one in choices(ledger)]

    plain, killed = run(tmp_path / "a", is_killed=False), run(tmp_path / "b", is_killed=True)
    assert plain == killed
    assert {arm for number, _, arm in plain if number == 1} == {"class-means"}
    assert (4, "device-0", "full") in plain, "what it declined was no policy"


@pytest.mark.parametrize(
    ("job", "bits", "is_short"),
    [
        ({}, 0, False),
        ({"codec": "xor", "down_codec": "xor"}, 0, False),
        ({"down_codec": "int8"}, 0, True),
        ({"codec": "fp16"}, 10, True),
        ({"codec": "int8"}, 4, True),
        ({"traffic": "bits"}, 4, True),
    ],
)
def test_sums_and_head_have_the_bits_that_the_job_has(tmp_path, job, bits, is_short):
    log = []
    done = world(tmp_path, rounds=2, disturb=lambda *said: log.append(said) or (said[1],), **job).run()
    assert {o.work.sums_bits for _, o in spoken(log, Offer) if o.work.learns == "class-means"} == {bits}
    assert not any(o.work.sums_bits for _, o in spoken(log, Offer) if o.work.learns == "adapter")
    made = load(done.aggregator.version(1))
    xor = made["head.weight"].view("u4") ^ adapter()["head.weight"].view("u4")
    assert (not (xor % (1 << 13)).any()) == is_short
    if not bits and not is_short:
        assert_head(done, 1)
    for name, wanted in head_of(FOUR).items():
        assert cosine(made[name], wanted) > (0.99 if bits == 4 else 0.999999)


def cosine(one, other):
    one, other = np.float64(one).ravel(), np.float64(other).ravel()
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def test_the_version_after_the_head_round_is_the_head_alone_on_its_way(tmp_path):
    """Every device holds version 0: what did not change costs nothing."""
    log = []
    world(tmp_path, rounds=2, disturb=lambda *said: log.append(said) or (said[1],), down_codec="int8").run()
    first = [o for _, o in spoken(log, Offer) if o.version == 1]
    assert {(o.down_codec, o.is_exact) for o in first} == {("xor", True)}
    assert max(o.adapter.size_bytes for o in first) < 500, "of 12 kB"


def test_a_device_of_an_earlier_release_sends_its_sums_as_they_are(tmp_path, monkeypatch):
    """It skips the field."""
    monkeypatch.setattr("fleetune.device_runtime.agent.local_run.shortened_sums", lambda sums, bits: sums)
    done = world(tmp_path, codec="int8", rounds=1).run()
    for name, wanted in head_of(FOUR).items():
        np.testing.assert_allclose(load(done.aggregator.version(1))[name], wanted, rtol=2e-3)
