import logging

import pytest
from fleet import FOUR, first_adapter, in_process, settings_of, workbench_of, world

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.store.rows import rows
from fleetune.device_runtime.rules.gate import Gate
from fleetune.device_runtime.rules.rules import Reading, Rules, Temperature


def test_everyone_learns_that_the_job_is_over(tmp_path):
    done = world(tmp_path, evaluate=True).run()
    done.turn()
    assert {d.agent.finished for d in done.devices} == {"3 rounds are done"}
    assert all(d.kinds()[-1] == "finished" for d in done.devices)


def test_evaluation_fills_the_rows(tmp_path):
    done = world(tmp_path, evaluate=True).run()
    found = rows(done.aggregator.ledger)
    assert [row.round for row in found] == [0, 1, 2, 3]
    assert [row.devices for row in found] == [0, 4, 4, 4]
    assert found[3].loss < found[0].loss
    expected = workbench_of(9).evaluate(None, first_adapter())
    assert (found[0].loss, found[0].accuracy) == (expected.loss, expected.accuracy)
    assert done.aggregator.rows == found, "each row is told once, in order, and complete"


@pytest.mark.parametrize("turns", [3, 8, 14])
def test_a_killed_aggregator_goes_on_where_it_was(tmp_path, turns):
    running = world(tmp_path, evaluate=True, strategy="fedavgm")
    for _ in range(turns):
        running.turn()
    running.aggregator.kill()
    for _ in range(4):
        running.turn()
    running.aggregator.start(running.now)
    running.run()
    expected = in_process(FOUR, rounds=3, settings=settings_of(strategy="fedavgm"))
    assert running.aggregator.version(3) == expected
    assert [row.devices for row in rows(running.aggregator.ledger)] == [0, 4, 4, 4]


def test_an_update_acknowledged_before_the_kill_is_neither_lost_nor_trained_again(tmp_path):
    running = world(tmp_path, numbers=(0, 1), rounds=1)
    slow = running.devices[1]
    running.run(until=lambda: "offer" in slow.kinds())
    slow.kill()
    running.run(until=lambda: "accepted" in running.devices[0].kinds())
    running.aggregator.kill()
    running.aggregator.start(running.now)
    slow.start()
    running.run()
    assert running.devices[0].kinds().count("trained") == 1
    assert running.aggregator.version(1) == in_process((0, 1), rounds=1, settings=settings_of())


@pytest.mark.parametrize("turns", [2, 5, 8])
def test_a_killed_device_resumes(tmp_path, turns):
    running = world(tmp_path)
    for _ in range(turns):
        running.turn()
    running.devices[2].kill()
    for _ in range(3):
        running.turn()
    running.devices[2].start()
    running.run()
    assert running.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())


def test_a_device_that_stays_away_is_left_behind_at_the_deadline(tmp_path):
    running = world(tmp_path, min_clients=3, rounds=2, patience=Patience(deadline_s=30))
    running.run(until=lambda: running.devices[3].kinds()[-1:] == ["offer"])
    running.devices[3].kill()
    running.run()
    drop = {(1, 3), (2, 3)}
    assert running.aggregator.version(2) == in_process(FOUR, rounds=2, settings=settings_of(), drop=drop)


def test_a_restarted_server_brings_everyone_back(tmp_path):
    running = world(tmp_path)
    for turn in range(24):
        running.turn()
        if turn % 4 == 3:
            running.server.restart()
    running.run()
    assert running.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())


def hot_one(done, number):
    """Give a device a gate and a dial of its temperature, which says hot."""
    dial = [90.0]
    rules = Rules(temperature=Temperature(max_c=70), period_s=1, resume_after_s=0)
    done.devices[number].agent._gate = Gate(rules, lambda: Reading(temperature=dial[0]))
    return dial


def test_a_device_that_resumes_before_the_deadline_loses_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        paused = world(tmp_path, numbers=(0, 1), rounds=2, patience=Patience(deadline_s=600))
        dial = hot_one(paused, 1)
        paused.run(until=lambda: paused.now > 500)
    assert "device device-1 pauses: temperature 90.0 C is above 70 C" in caplog.text
    assert paused.aggregator.service.federation.version == 0
    dial[0] = 50.0
    paused.run()
    expected = in_process((0, 1), rounds=2, settings=paused.aggregator.settings)
    assert paused.aggregator.version(2) == expected


def test_a_round_closes_without_a_device_that_stays_paused_and_the_next_has_it_again(tmp_path):
    paused = world(tmp_path, numbers=(0, 1), rounds=2, min_clients=1, patience=Patience(deadline_s=100))
    dial = hot_one(paused, 1)
    service = paused.aggregator.service
    paused.run(until=lambda: service.federation.version == 1)
    paused.run(until=lambda: "offer" in paused.devices[1].kinds()[2:])
    dial[0] = 50.0
    paused.run()
    expected = in_process((0, 1), rounds=2, settings=paused.aggregator.settings, drop={(1, 1)})
    assert paused.aggregator.version(2) == expected


def test_a_pause_over_extensions_is_waited_for(tmp_path):
    paused = world(tmp_path, numbers=(0, 1), rounds=1, patience=Patience(deadline_s=60))
    dial = hot_one(paused, 1)
    paused.run(until=lambda: paused.now > 400)
    assert "declined" not in paused.devices[1].kinds()
    dial[0] = 50.0
    paused.run()
    expected = in_process((0, 1), rounds=1, settings=paused.aggregator.settings)
    assert paused.aggregator.version(1) == expected


def test_a_round_that_closes_and_the_next_that_opens_are_kept_with_one_commit_before_anything_is_said(
    tmp_path,
):
    running = world(tmp_path, rounds=2)
    said = []
    running.aggregator.ledger._sql.set_trace_callback(lambda statement: said.append(statement.split()[:3]))
    running.aggregator.service._outbound._seal = lambda topic, payload: said.append(["SAID"]) or payload
    running.run()
    start = said.index(["INSERT", "INTO", "versions"])
    end = said.index(["COMMIT"], start)
    assert ["INSERT", "INTO", "tasks"] in said[start:end]
    assert ["SAID"] not in said[start:end]
    assert said[end:].index(["SAID"]) < said[end:].index(["INSERT", "INTO", "versions"]), "then it is"
