from types import SimpleNamespace

import pytest

from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.commands import device_report
from fleetune.device_runtime.commands.device_report import Tally
from fleetune.device_runtime.commands.systemd import Notifier
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.rules.gate import Gate
from fleetune.device_runtime.rules.rules import Reading, Rules


def step(number, *, active_layers, seconds):
    values = {"step": number, "loss": 1.0, "active_layers": active_layers, "seconds": seconds}
    return Event("step", 1, values)


@pytest.fixture
def report_of():
    """Tell a tally of events; returns its report, what was passed on, and the last status."""

    def tell(*events):
        passed, notifier = [], Notifier({})
        tally = Tally(passed.append, notifier)
        for event in events:
            tally(event)
        gate, link = Gate(Rules(), Reading), Loopback().connect([])
        return tally.report("kitchen", link=link, gate=gate, reason="over"), passed, notifier.status

    return tell


def test_a_training_device_counts_steps_rounds_and_refusals(report_of):
    steps = [
        step(i, active_layers=n, seconds=s) for i, (n, s) in enumerate([(6, 0.1), (3, 0.2), (3, 0.6)], 1)
    ]
    others = [Event(kind, 1) for kind in ("accepted", "accepted", "refused", "declined")]
    report, passed, status = report_of(*steps, *others)
    assert (report.steps, report.rounds, report.refused, report.evaluations) == (3, 2, 2, 0)
    assert (report.step_ms_median, report.mean_active_layers) == (200.0, 4.0)
    assert (report.device_id, report.reason) == ("kitchen", "over")
    assert passed == others, "steps of the first seconds are not for people"
    assert status == "round 1: declined"


def test_an_evaluating_device_has_no_rounds(report_of):
    report, _, _ = report_of(Event("evaluated", 1), Event("accepted", 1))
    assert (report.evaluations, report.rounds, report.steps, report.step_ms_median) == (1, 0, 0, None)


def test_a_person_hears_of_a_step_every_few_seconds(monkeypatch):
    pretended = SimpleNamespace(now=0.0)
    monkeypatch.setattr(device_report.time, "monotonic", lambda: pretended.now)
    passed = []
    tally = Tally(passed.append, Notifier({}))
    for number in range(1, 40):
        pretended.now = number / 2
        tally(step(number, active_layers=6, seconds=0.5))
    assert [event.values["step"] for event in passed] == [10, 20, 30]
