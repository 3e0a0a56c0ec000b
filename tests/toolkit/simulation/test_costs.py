"""Times of steps: measured once, kept, and between two sizes a line."""

import json
from functools import partial

import numpy as np
import pytest
from simulated import TINY
from tiny import draw_data

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.errors import StateError
from fleetune.toolkit.simulation.calls import Call
from fleetune.toolkit.simulation.costs import Costs, Point, Sample, Stopwatch, line_through
from fleetune.toolkit.simulation.journal import Journal
from fleetune.toolkit.simulation.overhead import time_rounds

SUFFIX = (1, 1, 2, 2)


@pytest.fixture(scope="module")
def artifact():
    return open_artifact(TINY)


def test_a_kind_of_step_is_measured_once_and_for_all(artifact, tmp_path):
    asked = []

    def measure(sample):
        asked.append(sample)
        return [Point(10, 1.0), Point(20, 1.5)]

    path = tmp_path / "shared" / "timings.json"
    costs = Costs(path, artifact, measure)
    assert costs.call_s(Call(4, 10, plan=SUFFIX)) == 1.0
    assert costs.call_s(Call(4, 30, plan=SUFFIX)) == 2.0
    assert (
        Costs(path, artifact, lambda _: pytest.fail("measured again")).call_s(Call(4, 20, plan=SUFFIX)) == 1.5
    )
    assert [sample.call.is_step for sample in asked] == [False, True]
    assert json.loads(path.read_text())["machine"]


def test_a_busy_machine_is_one_for_the_forward_beside_a_step_too(artifact, tmp_path, monkeypatch):
    """A step that takes three forwards is kept as three of the forwards that were measured, whatever both take today."""
    data, pace = draw_data(artifact.manifest, 12, 16), [1.0]
    watch = Stopwatch(artifact, data, batch_size=4, settle=lambda: None)
    timed = lambda run: pace[0] * (1.0 if getattr(run.func, "__name__", "") == "evaluate" else 3.0)  # noqa: E731
    monkeypatch.setattr("fleetune.toolkit.simulation.costs._seconds", timed)
    costs = Costs(tmp_path / "timings.json", artifact, watch)
    assert costs.call_s(Call(4, 64)) == 1.0
    pace[0] = 1.7
    assert costs.call_s(Call(4, 64, plan=SUFFIX)) == pytest.approx(3.0)
    watch.close()


def test_a_round_beside_its_steps_is_timed_by_a_real_agent(artifact, tmp_path):
    rounds = partial(time_rounds, artifact, draw_data(artifact.manifest, 12, 16), batch_size=4)
    costs = Costs(
        tmp_path / "timings.json", artifact, lambda _: pytest.fail("no step was asked for"), rounds=rounds
    )
    assert 1e-4 < costs.beside_s(1) < 5
    kept = Costs(costs._path, artifact, lambda _: [], rounds=lambda: pytest.fail("measured again"))
    assert kept.beside_s(30) == costs.beside_s(30) >= costs.beside_s(1)
    assert Costs(tmp_path / "none.json", artifact, lambda _: []).beside_s(30) == 0


def test_of_rows_that_are_found_a_step_costs_its_share(artifact, tmp_path):
    costs = Costs(
        tmp_path / "timings.json",
        artifact,
        lambda sample: [Point(1, 1.0 if sample.cached else 3.0), Point(2, 1.0 if sample.cached else 3.0)],
    )
    assert costs.call_s(Call(4, 10, plan=SUFFIX), hit_share=0.25) == 0.75 * 3 + 0.25 * 1
    assert costs.call_s(Call(4, 10, share=0.5)) == 1.5


@pytest.mark.parametrize(
    ("points", "tokens", "seconds"),
    [
        ([(10, 1.0), (20, 2.0)], 40, 4.0),
        ([(10, 2.0), (20, 1.0)], 15, 2.0),  # does not fall
        ([(10, 0.1), (20, 2.0)], 10, 1.0),  # does not begin below zero
        ([(10, 1.0), (10, 1.0)], 20, 2.0),
    ],
)
def test_a_line_neither_falls_nor_begins_below_zero(points, tokens, seconds):
    assert line_through([Point(*point) for point in points], "here")(tokens) == pytest.approx(seconds)


BAD = [
    [],
    [(1, 1.0)],
    [(1, 1.0), (2, 0.0)],
    [(1, 1e300), (2, 1.0)],
    [(1, float("nan")), (2, 1.0)],
    [(0, 1.0), (2, 1.0)],
]


@pytest.mark.parametrize("bad", BAD)
def test_nonsense_in_the_file_is_refused(bad):
    with pytest.raises(StateError, match="here: expected two times above 0 s"):
        line_through([Point(*point) for point in bad], "here")


def test_the_real_engine_is_timed_at_two_sizes(artifact):
    rested = []
    data = draw_data(artifact.manifest, 12, 16)
    watch = Stopwatch(artifact, data, batch_size=4, settle=lambda: rested.append(1))
    gates = np.packbits(np.eye(4, dtype=np.bool_) == 0).tobytes()
    suffix, gated = Call(4, 64, plan=SUFFIX), Call(4, 64, plan=(2,) * 4, gates=gates)
    for sample in (Sample(suffix), Sample(suffix, cached=True), Sample(Call(4, 64)), Sample(gated)):
        short, long = watch(sample)
        assert (short.size, long.size) == (32, 64)
        assert min(short.seconds, long.seconds) > 0
    watch.close()
    assert len(rested) == 4


def test_a_damaged_journal_is_told_in_one_line(tmp_path):
    (tmp_path / "journal.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StateError, match="move it away to begin anew"):
        Journal(tmp_path, "digest")


def test_calls_with_a_bound_in_tokens_are_kinds_of_their_own(artifact, tmp_path):
    asked = []

    def measure(sample):
        asked.append((sample.call.is_step, sample.call.memory, sample.forward_s is None))
        seconds = 2.0 if sample.call.memory.micro_tokens else 1.0
        return [Point(1, seconds), Point(2, seconds)]

    bound = MemoryPlan(micro_tokens=16)
    costs = Costs(tmp_path / "timings.json", artifact, measure)
    assert costs.call_s(Call(4, 64, plan=SUFFIX)) == 1.0
    assert costs.call_s(Call(4, 64, plan=SUFFIX, memory=bound)) == 2.0
    assert costs.call_s(Call(4, 64, share=0.5)) == 0.5
    assert costs.call_s(Call(4, 64, share=0.5, memory=bound)) == 1.0
    assert [bound in row for row in asked] == [False, False, True, True]
    assert [is_first for *_, is_first in asked] == [True, False, False, False]
    assert set(costs._file().artifacts[artifact.digest]) == {
        "forward",
        "forward, 16 tokens at a time",
        "below 2, trained 2",
        "below 2, trained 2, 16 tokens at a time",
    }


def test_the_real_engine_is_timed_as_the_call_was_held(artifact, monkeypatch):
    data, held = draw_data(artifact.manifest, 12, 16), []
    watch = Stopwatch(artifact, data, batch_size=4, settle=lambda: None)
    monkeypatch.setattr("fleetune.toolkit.simulation.costs._seconds", lambda run: held.append(run) or 1.0)
    bound = MemoryPlan(micro_tokens=16)
    for call in (Call(4, 64, memory=bound), Call(4, 64, plan=SUFFIX, memory=bound)):
        held.clear()
        assert [point.seconds for point in watch(Sample(call, forward_s=lambda tokens: 3.0))] == [3.0, 3.0]
        own, plain = held[:2]
        assert own.keywords["rows"].memory == bound
        assert "rows" not in plain.keywords
    watch.close()
