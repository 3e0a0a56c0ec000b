"""Updates that come together are kept with one commit: no verdict before it, and nothing of it after a kill."""

import pytest
from fleet import JOB, in_process, settings_of, world

from fleetune.device_runtime.contracts.wire import Verdict, decode, device_topic
from fleetune.device_runtime.errors import StateError

FOUR = (0, 1, 2, 3)
ROUNDS = 3


def watched(folder, *, before=lambda number: None):
    """A job whose aggregator reads what four devices say at once; ``before`` each commit it is told its number."""
    running = world(folder, rounds=ROUNDS)
    running.groups, running.early = [], []
    aggregator = running.aggregator

    def watch():
        ledger, service = aggregator.ledger, aggregator.service
        accept, tell, add = ledger.accept_all, service._outbound.tell, ledger.add_version

        def kept(arrived):
            before(len(running.groups) + 1)
            accept(arrived)
            running.groups.append([one.update.task_id for one in arrived])

        def told(device_id, message):
            if isinstance(message, Verdict) and message.accepted:
                is_kept = (
                    ledger.digest_of(message.task_id) == message.digest and not ledger._sql.in_transaction
                )
                running.early += [] if is_kept else [message.task_id]
            return tell(device_id, message)

        def added(version, content, **options):
            running.early += [f"version {version}"] if service._uploads._group else []
            return add(version, content, **options)

        ledger.accept_all, service._outbound.tell, ledger.add_version = kept, told, added

    watch()
    return running


@pytest.fixture(scope="module")
def direct():
    return in_process(FOUR, rounds=ROUNDS, settings=settings_of(rounds=ROUNDS))


def test_several_are_kept_at_once_and_none_is_told_before(tmp_path, direct):
    running = watched(tmp_path).run()
    assert max(map(len, running.groups)) > 1
    assert sorted(task for group in running.groups for task in group) == sorted(
        f"train-{number}-device-{device}" for number in range(1, ROUNDS + 1) for device in FOUR
    )
    assert running.early == []
    assert running.aggregator.version(ROUNDS) == direct


def test_a_kill_before_the_commit_loses_the_group_and_no_update(tmp_path, direct):
    def kill(number):
        if number == 2:
            raise KeyboardInterrupt

    running = watched(tmp_path, before=kill)
    with pytest.raises(KeyboardInterrupt):
        running.run()
    running.aggregator.kill()
    running.aggregator.start(running.now)
    running.run()
    assert running.aggregator.version(ROUNDS) == direct


def test_what_a_group_costs_is_kept_with_it_or_neither(tmp_path, monkeypatch):
    running = watched(tmp_path)
    spend, ledger = running.aggregator.ledger.spend, running.aggregator.ledger

    def killed(number, *what):
        if running.groups:
            raise KeyboardInterrupt
        spend(number, *what)

    monkeypatch.setattr(ledger, "spend", killed)
    with pytest.raises(KeyboardInterrupt):
        running.run()
    assert ledger.past().accepted == {}


def test_a_group_that_cannot_be_written_is_not_kept_in_part(tmp_path, monkeypatch):
    running = watched(tmp_path)
    ledger = running.aggregator.ledger
    monkeypatch.setattr(
        ledger._blobs, "write_payloads", lambda payloads: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(StateError, match=r"cannot write the ledger: .*full"):
        running.run()
    assert ledger.past().accepted == {}
    assert running.early == []


def test_what_is_said_again_while_it_waits_is_answered_once_it_is_kept(tmp_path, direct):
    """Every announcement comes twice, the second behind what was asked for meanwhile."""
    running = watched(tmp_path)
    running.server.disturb = lambda topic, payload: (
        (payload, payload)
        if topic in {device_topic(JOB, f"device-{n}", "up") for n in FOUR} and decode(payload)
        else (payload,)
    )
    running.run()
    assert running.early == []
    assert running.aggregator.version(ROUNDS) == direct
