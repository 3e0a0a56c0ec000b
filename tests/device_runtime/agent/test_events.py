import pytest

from fleetune.device_runtime.agent.events import Event


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            Event("step", 3, {"step": 178, "loss": 0.612345, "active_layers": 6, "seconds": 0.3}),
            "round 3: step 178, loss 0.6123, active layers 6, seconds 0.3",
        ),
        (
            Event("trained", 1, {"loss": 2.0, "size_bytes": 12345678}),
            "round 1: trained: loss 2, size 12345.7 kB",
        ),
        (
            Event("step", 1, {"step": 12345678, "loss": 1.0}),
            "round 1: step 12345678, loss 1",
        ),
        (Event("paused", 0, text="temperature 90.0 C"), "round 0: paused: temperature 90.0 C"),
        (Event("accepted", 2), "round 2: accepted"),
    ],
)
def test_an_event_reads_well(event, line):
    assert str(event) == line
