"""A job that runs on and on: its ledger and history are bounded, and no bit of it depends on what is settled, nor on a kill."""

from types import SimpleNamespace

import msgspec
import pytest
from fleet import STEPS, world

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.service import result
from fleetune.broker.service.result import Result
from fleetune.broker.store.rows import Row, rows
from fleetune.broker.store.settling import AT_ONCE
from fleetune.device_runtime.contracts.work import LocalWork

ROUNDS, KEEP = 44, 4
WORK = LocalWork(steps=STEPS, codec="innovation", codec_bits=6)
JUDGED = SimpleNamespace(manifest=SimpleNamespace(problem_type="", labels=["a", "b"]))
"""An artifact, as far as a history asks."""


def job(folder, *, keep):
    """Three devices, two a round: which of them is a lazy one is remembered from its last update, long ago or not."""
    return world(
        folder, numbers=(0, 1, 2), evaluate=True, rounds=ROUNDS, clients=2, min_clients=2, work=WORK, lazy=0.8,
        down_codec="int8", patience=Patience(keep_versions=2, keep_rounds=keep),
    )  # fmt: skip


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """All is kept."""
    return job(tmp_path_factory.mktemp("calm"), keep=0).run()


def test_no_bit_depends_on_what_is_settled_nor_on_kills(tmp_path, calm):
    running = job(tmp_path, keep=KEEP)
    running.run_killed_at({50, 150, 240, 241, 300, 380, 420})
    aggregator, whole = running.aggregator, calm.aggregator
    assert aggregator.starts > 5
    assert aggregator.version(ROUNDS) == whole.version(ROUNDS)
    ledger = aggregator.ledger
    assert 0 < ROUNDS - KEEP - ledger.settled < AT_ONCE
    assert ledger.turns() == whole.ledger.turns()
    found = {row.round: (row.train_loss, row.loss, row.devices) for row in rows(ledger)}
    wanted = {row.round: (row.train_loss, row.loss, row.devices) for row in rows(whole.ledger)}
    assert len(found) <= KEEP + AT_ONCE + KEEP + 1
    assert found == {number: wanted[number] for number in found}


def test_rows_of_settled_rounds_are_told_again_as_far_as_they_are_known(tmp_path):
    running = job(tmp_path, keep=KEEP).run()
    told = running.aggregator.rows
    assert [row.round for row in told] == list(range(ROUNDS + 1))
    running.aggregator.kill()
    told.clear()
    running.aggregator.start(running.now)
    running.aggregator.service.tick(running.now)
    settled = running.aggregator.ledger.settled
    assert [row.round for row in told] == [0, 8, 16, 24, settled, *range(settled + 1, ROUNDS + 1)]
    assert running.aggregator.service.snapshot().rows == told


def test_the_history_of_run_json_is_bounded(tmp_path, monkeypatch, calm):
    written = []
    monkeypatch.setattr(
        result, "write_run", lambda folder, artifact, arguments, report: written.append(report)
    )
    monkeypatch.setattr(result, "save_peft", lambda *_: None)
    ledger, told = calm.aggregator.ledger, []
    one = Result(ledger, JUDGED, {}, keep_rounds=KEEP)
    monkeypatch.setattr(type(ledger), "newest", property(lambda _: len(told) - 1))
    monkeypatch.setattr(one, "_write_adapter", lambda newest: None)
    for number in range(ROUNDS):
        told.append(number)
        one.tell(Row(round=number, devices=1))
    history = [msgspec.json.decode(raw)["round"] for raw in written[-1].history]
    assert history == [0, 8, 16, 24, 32, 40, 41, 42, 43]
    assert max(len(report.history) for report in written) <= 2 * KEEP + 1
