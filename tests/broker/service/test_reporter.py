from rounds_by_hand import federation, give, hello, past, report, task, update_of

from fleetune.broker.service.reporter import Reporter
from fleetune.broker.store.memory_store import MemoryStore


class Told:
    """A job by hand whose rows are told into a list."""

    def __init__(self, *, past=None, **changes):
        self.machine, self.store, self.rounds = (
            federation(past, clients=1, min_clients=1, **changes),
            MemoryStore(),
            [],
        )
        self.store.add_version(0, b"zero", round_number=0)
        self.reporter = Reporter(self.store, self.machine, lambda row: self.rounds.append(row.round))

    def hello(self, device, **changes):
        self.machine.hello(hello(device, **changes), 0.0)
        self.reporter.tell()

    def close(self, number):
        self.store.enrol([task("a", number)])
        self.store.accept(update_of(task("a", number), b"x"), b"x")
        give(self.machine, "a", number)
        self.store.add_version(number, b"one", round_number=number)
        self.reporter.tell()

    def report(self, version):
        self.store.report(report("e", version))
        self.machine.reported(report("e", version), 1.0)
        self.reporter.tell()


def test_a_row_is_told_once_when_its_report_is_here_and_not_before():
    told = Told(rounds=3)
    told.hello("e", role="evaluate")
    told.hello("a")
    assert told.rounds == []
    told.report(0)
    assert told.rounds == [0]
    told.close(1)
    assert told.rounds == [0]
    told.report(1)
    assert told.rounds == [0, 1]


def test_without_evaluating_devices_rows_follow_the_rounds_and_the_first_waits_for_one():
    told = Told(rounds=3)
    told.hello("a")
    assert told.rounds == []
    told.close(1)
    assert told.rounds == [0, 1]


def test_the_end_tells_what_is_left():
    told = Told(rounds=1)
    told.hello("e", role="evaluate")
    told.hello("a")
    told.close(1)
    assert told.rounds == []
    told.store.finish()
    told.reporter.tell()
    assert told.rounds == [0, 1]


def test_after_a_restart_a_row_waits_for_who_evaluated_before_and_is_not_here_yet():
    """Its figures come a moment later, and a row is told once."""
    told = Told(rounds=3, past=past(2, reported=frozenset({(0, "e")})))
    told.store.add_version(1, b"one", round_number=1)
    told.store.report(report("e", 0))
    told.reporter.tell()
    assert told.rounds == [0]
    told.hello("a")
    assert told.rounds == [0]
    told.hello("e", role="evaluate")
    told.report(1)
    assert told.rounds == [0, 1]


def test_a_row_does_not_wait_for_an_evaluating_device_that_is_gone_longer_than_a_round():
    told = Told(rounds=3, past=past(2, reported=frozenset({(0, "e")})))
    told.store.add_version(1, b"one", round_number=1)
    told.hello("a")
    told.close(2)
    assert told.rounds == [0, 1]
