"""A fleet whose work a configurator chooses: killed anywhere it chooses the same, and what a device declines is remembered."""

from collections import Counter
from functools import partial

import msgspec
import pytest
from fleet import Aggregator, Device, World, workbench_of

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.work import device_work
from fleetune.broker.methods.auto import Tuning
from fleetune.broker.methods.configurators import CONFIGURATORS, Choice, Configurator
from fleetune.broker.service.choices import choices, replay
from fleetune.broker.store.rows import rows
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, TooLittleMemory
from fleetune.device_runtime.network.loopback import Loopback

ROUNDS, SIZE = 5, 4
WORK = LocalWork(steps=2, held_out=0.1)
AUTO = {
    "configurator": "auto",
    "num_layers": 12,
    "rounds": ROUNDS,
    "clients": 3,
    "min_clients": 3,
    "work": WORK,
}


@pytest.fixture(autouse=True)
def long_enough(monkeypatch):
    """A job of these few rounds tries arms out all the same."""
    monkeypatch.setattr("fleetune.broker.methods.auto.TUNING", Tuning(least=0))


def telling(number, *, refuse=lambda policy: False):
    """A device whose figures are a function of its work alone, so that a run that is repeated tells the same."""
    bench = workbench_of(number, size=SIZE)

    def start(work, adapter):
        if refuse(work.policy):
            raise TooLittleMemory("memory budget of 9 MB: the least that would do is 10 MB")
        training = bench.start(work, adapter)
        gain = 0.05 + 0.01 * (work.seed % 7) + 0.02 * (work.policy.name == "full")
        training.stats = {
            "held_loss_before": 2.0,
            "held_loss_after": 2.0 - gain,
            "seconds": (1 + number) * (2.0 - work.policy.drop),
        }
        return training

    return bench._replace(start=start)


def fleet(folder, *, count=3, benches=None, in_memory=False, **changes):
    server = Loopback()
    aggregator = Aggregator(server, folder, size=SIZE, in_memory=in_memory, **{**AUTO, **changes}).start()
    benches = benches or [telling(n) for n in range(count)]
    devices = [
        Device(server, folder, n, size=SIZE, workbench=bench).start() for n, bench in enumerate(benches)
    ]
    return World(server, aggregator, devices)


def chosen(aggregator):
    return [(made.round, made.device, made.arm, made.reason) for made in choices(aggregator.ledger)]


def assert_replayed(aggregator):
    made = list(replay(aggregator.ledger, aggregator.settings))
    assert made
    for task, choice in made:
        assert (choice.work, choice.reason) == (task.work, task.reason)


def test_all_choices_are_those_of_the_ledger_and_the_history_counts_them(tmp_path):
    playing = fleet(tmp_path).run()
    ledger = playing.aggregator.ledger
    assert_replayed(playing.aggregator)
    for row in rows(ledger)[1:]:
        assert row.arms == Counter(made.arm for made in choices(ledger) if made.round == row.round)
    assert len({made.arm for made in choices(ledger)}) > 3
    first = next(choices(ledger))
    assert first.reward == pytest.approx(first.gain / first.seconds)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_an_aggregator_that_is_killed_after_every_so_many_outcomes_chooses_the_same(tmp_path, every):
    undisturbed = fleet(tmp_path / "a").run()
    playing = fleet(tmp_path / "b")
    aggregator, kills = playing.aggregator, 0

    def has(count):
        return aggregator.service.finished or len(list(aggregator.ledger.outcomes())) >= count

    while not aggregator.service.finished:
        goal = min(len(list(aggregator.ledger.outcomes())) + every, 3 * ROUNDS)
        playing.run(until=partial(has, goal))
        if not aggregator.service.finished:
            aggregator.kill()
            aggregator.start(playing.now)
            kills += 1
    assert kills >= 2, "several outcomes may come at once"
    assert_replayed(aggregator)
    assert [made[:3] for made in chosen(aggregator)] == [made[:3] for made in chosen(undisturbed.aggregator)]


def test_a_device_that_declines_for_memory_is_asked_for_less_in_the_same_round_and_never_for_as_much_again(
    tmp_path,
):
    small = telling(0, refuse=lambda policy: policy.drop < 0.5)
    playing = fleet(tmp_path, benches=[small, telling(1), telling(2)])
    playing.run()
    made = [one for one in choices(playing.aggregator.ledger) if one.device == "device-0"]
    declined = [one for one in made if one.declined]
    assert declined
    assert all("memory budget" in one.declined for one in declined)
    assert len({one.arm for one in declined}) == len(declined)
    assert {one.round for one in made if not one.declined} == set(range(1, ROUNDS + 1)), (
        "it took part in each round"
    )
    assert_replayed(playing.aggregator)


def test_what_was_declined_is_known_after_a_restart(tmp_path):
    small = telling(0, refuse=lambda policy: policy.drop < 0.5)
    playing = fleet(tmp_path, benches=[small, telling(1), telling(2)])
    aggregator = playing.aggregator
    playing.run(until=lambda: any(one.declined for one in choices(aggregator.ledger)))
    aggregator.kill()
    aggregator.start(playing.now)
    playing.run()
    declined = [one.arm for one in choices(aggregator.ledger) if one.declined]
    assert len(set(declined)) == len(declined), "no arm is declined twice"
    assert_replayed(aggregator)


def test_a_device_that_declines_everything_is_left_out_with_one_line(tmp_path, caplog):
    none = telling(0, refuse=lambda policy: True)
    playing = fleet(tmp_path, benches=[none, telling(1), telling(2)], clients=3, min_clients=2)
    playing.run()
    lines = [record.getMessage() for record in caplog.records if "is asked no more" in record.getMessage()]
    assert lines == [
        "device device-0 is asked no more: it declined every arm, suffix 0.917 the least of them"
    ]
    assert playing.aggregator.service.federation.rounds.roster.present == ("device-1", "device-2")


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_job_that_no_device_can_do_ends_with_a_plain_error(tmp_path, is_killed):
    playing = fleet(
        tmp_path, benches=[telling(n, refuse=lambda policy: True) for n in range(2)], clients=2, min_clients=2
    )
    if is_killed:
        playing.run(until=lambda: sum(bool(one.declined) for one in choices(playing.aggregator.ledger)) >= 2)
        playing.aggregator.kill()
        playing.aggregator.start(playing.now)
    with pytest.raises(
        ConfigError, match="no device is left that can do any of the work: device-0: it declined"
    ):
        playing.run()


def test_a_fixed_job_asks_a_device_that_declined_again_in_the_next_round_alone(tmp_path):
    asked = []

    def refuse(policy):
        asked.append(policy)
        return True

    benches = [telling(0, refuse=refuse), telling(1), telling(2)]
    playing = fleet(tmp_path, benches=benches, configurator="fixed", clients=3, min_clients=2, rounds=3)
    playing.run()
    assert len(asked) == 3


def test_devices_of_one_round_may_have_other_codecs_batches_and_policies(tmp_path, monkeypatch):
    codecs = ("fp32", "int8", "fp16")

    def choose(settings, candidate):
        work = device_work(settings, round_number=candidate.round, position=candidate.position)
        codec = codecs[candidate.position % 3]
        return Choice(msgspec.structs.replace(work, codec=codec, batch_size=1 + candidate.position))

    made = Configurator(lambda settings: settings, choose, lambda state, _: state)
    monkeypatch.setitem(CONFIGURATORS, "mixed", lambda: made)
    seen = []

    def watched(bench):
        def start(work, adapter):
            seen.append((work.codec, work.batch_size))
            return bench.start(work, adapter)

        return bench._replace(start=start)

    benches = [watched(telling(n)) for n in range(3)]
    playing = fleet(
        tmp_path, benches=benches, configurator="mixed", rounds=3, down_codec="int8", patience=Patience()
    )
    playing.run()
    assert set(seen) == {("fp32", 1), ("int8", 2), ("fp16", 3)}
    assert [row.devices for row in rows(playing.aggregator.ledger)] == [0, 3, 3, 3]
    assert not [e for device in playing.devices for e in device.events if e.kind in ("refused", "declined")]


def test_the_store_in_memory_tells_the_same(tmp_path):
    on_disk, in_memory = fleet(tmp_path / "a").run(), fleet(tmp_path / "b", in_memory=True).run()
    assert_replayed(in_memory.aggregator)
    assert chosen(in_memory.aggregator) == chosen(on_disk.aggregator)
    assert [row.arms for row in rows(in_memory.aggregator.ledger)] == [
        row.arms for row in rows(on_disk.aggregator.ledger)
    ]
