"""Workers that die: one that is killed is replaced and its task done again; a task that kills two is told with its device."""

import os
import signal

import pytest
from simulated import TINY, write_config

from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.simulation.jobs import Done, Share, Task
from fleetune.toolkit.simulation.pool import Pool
from fleetune.toolkit.simulation.simulate import simulate
from fleetune.toolkit.simulation.workers import Inline, processes


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = write_config(tmp_path_factory.mktemp("pool")).parent
    adapter = to_bytes(open_artifact(TINY).adapter())
    share = Share.of(str(folder / "train.csv"), [0, 5, 7, 30, 31, 80])
    return Task(
        kind="train", device="kitchen", share=share, work=LocalWork(steps=3, batch_size=4), adapter=adapter
    )


class Mortal:
    """Dies of its first task; afterwards it does nothing."""

    def __init__(self):
        self.given = []

    def give(self, content):
        self.given.append(content)

    def stop(self):
        self.given.append("stopped")


def test_a_killed_process_is_replaced_and_its_task_done_again(task):
    inline = Inline(TINY)
    wanted = inline.wait_for(inline.submit(task, lambda _: None))
    inline.close()
    team = processes(TINY, 2)
    try:
        kept = []
        tickets = [team.submit(task, kept.append) for _ in range(3)]
        for worker in team.workers:
            os.kill(worker.process.pid, signal.SIGKILL)
        assert [team.wait_for(ticket) for ticket in tickets] == [wanted] * 3
        assert kept == [wanted] * 3
    finally:
        team.close()


def test_a_task_that_kills_two_workers_is_told_with_its_device(task):
    made = []
    team = Pool(lambda: made.append(Mortal()) or made[-1], lambda at_work, _: [(at_work[0], None)], 1)
    ticket = team.submit(task, lambda _: pytest.fail("it was never done"))
    with pytest.raises(ConfigError, match="device kitchen: 2 workers died over its train task of round 1"):
        team.wait_for(ticket)
    assert len(made) == 3
    assert all(worker.given[-1] == "stopped" for worker in made[:2])


def test_a_pool_that_cannot_start_leaves_no_worker():
    made = []

    def start():
        if len(made) == 3:
            raise OSError("no more processes")
        made.append(Mortal())
        return made[-1]

    with pytest.raises(OSError, match="no more processes"):
        Pool(start, lambda *_: [], 5)
    assert [worker.given for worker in made] == [["stopped"]] * 3


def test_more_workers_than_a_machine_has_are_refused_before_one_starts(tmp_path):
    with pytest.raises(ConfigError, match="workers must be at most 1024, got 1000000007"):
        simulate(write_config(tmp_path), out=tmp_path / "run", workers=1_000_000_007)
    assert not (tmp_path / "run").exists()


def test_a_task_that_is_cancelled_before_anyone_has_it_is_never_given(task):
    worker = Mortal()
    done = []

    def arrivals(at_work, timeout_s):
        return [] if timeout_s == 0 else [(worker, Done(num_samples=len(done)))]

    team = Pool(lambda: worker, arrivals, 1)
    tickets = [team.submit(task, done.append) for _ in range(4)]
    assert len(worker.given) == 2  # one at work, one ahead
    team.cancel(tickets[2])
    team.wait_for(tickets[3])
    assert tickets[2].done is None
    assert len(worker.given) == 3


def test_measuring_waits_until_nothing_is_at_work(task):
    worker = Mortal()
    team = Pool(lambda: worker, lambda *_: [(worker, Done())] if _[1] is None else [], 1)
    tickets = [team.submit(task, lambda _: None) for _ in range(3)]
    team.settle()
    assert [ticket.done is not None for ticket in tickets] == [True, True, False]
