"""Versions are kept as long as somebody needs them, and a round costs the same however many there were before."""

import sys
from collections import Counter
from types import SimpleNamespace

import fleet
import pytest
from rounds_by_hand import job

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.rounds.evaluations import Evaluations
from fleetune.broker.service import result
from fleetune.broker.service.result import HISTORY_SHARE, Result
from fleetune.broker.store.kept_versions import read_version
from fleetune.broker.store.rows import Row, rows
from fleetune.device_runtime.contracts.wire import Request, encode
from fleetune.device_runtime.errors import ConfigError, StateError
from fleetune.device_runtime.terms.terms import Terms

JUDGED = SimpleNamespace(manifest=SimpleNamespace(problem_type="", labels=["a", "b"]))
"""An artifact, as far as a history asks."""


def kept(folder):
    return sorted(
        int(path.stem) for path in (folder / "versions").glob("*.safetensors") if path.stem.isdecimal()
    )


def ran(folder, *, keep, rounds=8, **changes):
    return fleet.world(
        folder, numbers=(0, 1), rounds=rounds, patience=Patience(keep_versions=keep), **changes
    ).run()


def test_files_of_old_versions_go_and_what_is_known_of_them_stays(tmp_path):
    world = ran(tmp_path, keep=2, evaluate=True)
    ledger, folder = world.aggregator.ledger, world.aggregator.folder
    assert kept(folder) == [0, 7, 8]
    assert [row.round for row in rows(ledger)] == list(range(9))
    assert all(row.loss is not None for row in rows(ledger))
    with pytest.raises(StateError, match="named in the ledger, but cannot be read"):
        ledger.version(3)
    with pytest.raises(
        ConfigError, match=r"version 3 is not kept any more \(--keep-versions\); there are 0, 7, 8$"
    ):
        read_version(folder, 3)
    assert read_version(folder).version == 8
    assert read_version(folder, 0).content


@pytest.mark.parametrize("in_memory", [False, True])
def test_no_bit_depends_on_what_is_kept(tmp_path, in_memory):
    last = [
        ran(
            tmp_path / str(keep), keep=keep, codec="int8", down_codec="int8", in_memory=in_memory
        ).aggregator.version(8)
        for keep in (0, 1, 3)
    ]
    assert last[0] == last[1] == last[2]
    if not in_memory:
        assert kept(tmp_path / "0" / "aggregator") == list(range(9))


def test_an_aggregator_that_is_killed_goes_on_with_what_it_keeps(tmp_path):
    calm = ran(tmp_path / "calm", keep=0).aggregator.version(8)
    world = fleet.world(tmp_path / "killed", numbers=(0, 1), rounds=8, patience=Patience(keep_versions=1))
    world.run_killed_at({5, 20, 40, 41, 60})
    assert world.aggregator.version(8) == calm
    files = kept(world.aggregator.folder)
    assert (files[0], files[-1]) == (0, 8)
    assert len(files) <= 4, "devices may hold another each"


def test_a_version_that_a_device_holds_is_kept_for_it(tmp_path):
    world = fleet.world(
        tmp_path, numbers=(0, 1), clients=1, min_clients=1, rounds=40, patience=Patience(keep_versions=1)
    )
    world.run(until=lambda: world.aggregator.ledger.newest >= 2)
    world.run()
    files = kept(world.aggregator.folder)
    assert files[0] == 0
    assert files[-1] == 40
    assert len(files) <= 2 + len(world.devices)


def test_chunks_of_a_version_that_is_gone_are_not_served_and_end_nothing(tmp_path):
    world = fleet.world(tmp_path, numbers=(0, 1), evaluate=True, rounds=6, patience=Patience(keep_versions=1))
    world.run(until=lambda: world.aggregator.ledger.newest >= 1)
    downlink = world.aggregator.service._versions.downlink
    offered = downlink._offered["device-0"]
    downlink._shelf.clear()
    world.aggregator.ledger.forget_before(99)
    (world.aggregator.folder / "versions" / f"{offered.key.version:05d}.safetensors").unlink(missing_ok=True)
    request = Request(sha256=offered.transfer.sha256, missing=b"\1", limit=1)
    topic = next(t for t in world.devices[0].identity.topics if t.endswith("down")).replace("down", "up")
    world.aggregator.service.take(topic, encode(request), world.now)


def evaluations(keep):
    found = Evaluations(job(rounds=100), (), keep_versions=keep)
    found.advance(0, is_last=False)
    return found


def test_a_device_that_is_behind_keeps_what_it_owes_up_to_a_bound():
    found = evaluations(2)
    assert [a.task.version for a in found.hello("e")] == [0]
    for version in range(1, 16):
        found.advance(version, is_last=False)
    assert found.oldest == 0
    moved = found.advance(16, is_last=False)
    assert (found.oldest, [a.task.version for a in moved]) == (1, [1])
    found.offline("e")
    found.advance(17, is_last=False)
    assert found.oldest == 16


def test_who_comes_late_measures_what_is_kept():
    found = evaluations(3)
    for version in range(1, 51):
        found.advance(version, is_last=False)
    assert found.oldest == 48
    assert [a.task.version for a in found.hello("late")] == [48]
    assert len(found._due) == len(found._reporters) == 3


def test_all_are_measured_where_all_are_kept():
    found = evaluations(0)
    for version in range(1, 51):
        found.advance(version, is_last=False)
    assert [a.task.version for a in found.hello("late")] == [0]


@pytest.fixture
def opened():
    """Counts files that are opened and folders that are listed while its flag is up."""
    counts, state = Counter(), {"on": False}

    def hook(event, arguments):
        if state["on"] and event in ("open", "os.listdir", "os.scandir", "glob.glob"):
            counts[event] += 1

    sys.addaudithook(hook)
    yield counts, state
    state["on"] = False


def test_a_round_costs_the_same_however_many_there_were(tmp_path, opened):
    """Operations are counted, no time: files opened, folders listed, and steps of SQLite's machine at the aggregator."""
    counts, state = opened
    terms = Terms(
        least_effective=0,
        least_samples=0,
        least_batch=0,
        least_of_a_class=0,
        most_rounds_a_day=0,
        most_change=0,
    )
    server = fleet.Loopback()
    aggregator = fleet.Aggregator(
        server,
        tmp_path,
        size=20,
        rounds=160,
        clients=2,
        min_clients=2,
        codec="int8",
        patience=Patience(keep_versions=8),
    )
    aggregator.start()
    devices = [fleet.Device(server, tmp_path, n, size=20, terms=terms).start() for n in (0, 1)]
    devices.append(
        fleet.Device(server, tmp_path, 9, name="eval", role="evaluate", size=20, terms=terms).start()
    )
    world = fleet.World(server, aggregator, devices)
    steps = Counter()
    for name, sql in (("ledger", aggregator.ledger._sql), *((d.name, d.outbox._database) for d in devices)):
        sql.set_progress_handler(lambda name=name: steps.update([name]), 10)

    def span(first):
        world.run(until=lambda: aggregator.ledger.newest >= first, turns=20_000)
        counts.clear(), steps.clear()
        state["on"] = True
        world.run(until=lambda: aggregator.ledger.newest >= first + 20, turns=20_000)
        state["on"] = False
        return {**counts, **steps}

    early, late = span(40), span(130)
    assert {"open", "ledger"} <= early.keys() == late.keys()
    for name, count in early.items():
        assert late[name] <= 1.06 * count + 10, (early, late)


def test_run_json_is_not_written_ever_more(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        result, "write_run", lambda folder, artifact, arguments, report: written.append(len(report.history))
    )
    monkeypatch.setattr(result, "save_peft", lambda *_: None)
    world = ran(tmp_path, keep=2, rounds=2)
    ledger = world.aggregator.ledger
    one, told = Result(ledger, JUDGED, {}), []
    monkeypatch.setattr(type(ledger), "newest", property(lambda _: len(told) - 1))
    monkeypatch.setattr(result, "row", lambda _, version, **_k: Row(round=version, devices=1))
    monkeypatch.setattr(one, "_write_adapter", lambda newest: None)
    for number in range(3 * HISTORY_SHARE):
        told.append(number)
        one.tell(Row(round=number, devices=1))
    share = sum(count for count in written if count > HISTORY_SHARE) / sum(
        count > HISTORY_SHARE for count in range(3 * HISTORY_SHARE)
    )
    assert written[:3] == [2, 3, 4]
    assert share < 1.5 * HISTORY_SHARE
    one.keep(whole=True)
    assert written[-1] == 3 * HISTORY_SHARE
