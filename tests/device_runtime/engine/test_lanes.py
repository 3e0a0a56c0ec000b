"""Rows on several threads at once: the same step, in a process of its own, because what a process opens first decides."""

import json
import subprocess
import sys
import threading

import pytest

from fleetune.device_runtime.engine.lanes import Lanes, count_cores, count_lanes

PROBE = """
import json, sys
import numpy as np
from fleetune.device_runtime.engine import onnx_graphs as graphs
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode, full
from fleetune.device_runtime.engine.stack import Stack

artifact, rows, first = open_artifact(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
shapes = {row.name: [{"batch": rows, "seq": int(sys.argv[4])}[d] for d in row.shape] for row in artifact.manifest.inputs}
batch = {name: rng.integers(1, 5, shape) for name, shape in shapes.items()}
adapter = {n: a + rng.normal(size=a.shape, scale=0.1).astype(np.float32) for n, a in artifact.adapter().items()}
plan = (Mode.TRAIN,) * 4
found = {}
if first:  # a graph that shares the pool
    with Stack(artifact, threads=2, in_lanes=False) as stack:
        stack.predict({n: a[:1] for n, a in batch.items() if n != "labels"}, adapter)
for name, memory, in_lanes in [
    ("lanes", MemoryPlan(), True),
    ("micro", MemoryPlan(micro_batch=4, streamed=True), True),
    ("recompute", MemoryPlan(saved_layers=1), True),
    ("together", MemoryPlan(), False),
]:
    with Stack(artifact, threads=2, memory=memory, in_lanes=in_lanes) as stack:
        result = stack.step(batch, plan, adapter)
        loss, answers = stack.evaluate(batch, adapter)
        logits = stack.predict({n: a for n, a in batch.items() if n != "labels"}, adapter)
        values = [result.loss, loss, *result.logits.ravel(), *logits.ravel(), *answers]
        values += [x for n in sorted(result.grads) for x in result.grads[n].ravel()]
        found[name] = {"lanes": stack.lanes, "values": [float(x) for x in values]}
print(json.dumps(found | {"pool": len(graphs._pool_started)}))
"""


def probe(artifact, rows: int, *, first: bool = False, seq: int = 64) -> dict:
    command = [sys.executable, "-c", PROBE, str(artifact), str(rows), str(int(first)), str(seq)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("rows", [8, 7])
def test_the_step_stays_what_it_is(word_artifact, rows) -> None:
    found = probe(word_artifact, rows)
    expected = found.pop("together")["values"]
    assert found.pop("pool") == 0  # the lanes came first
    for name, made in found.items():
        assert made["lanes"] == 2, name
        assert made["values"] == pytest.approx(expected, rel=1e-4, abs=2e-6), name


def test_too_few_rows_share_the_kernels(word_artifact) -> None:
    found = probe(word_artifact, 1)
    assert found.pop("pool") == 1
    assert {made["lanes"] for made in found.values()} == {1}


def test_short_rows_share_the_kernels(word_artifact) -> None:
    found = probe(word_artifact, 8, seq=20)
    assert found.pop("pool") == 1
    assert {made["lanes"] for made in found.values()} == {1}


def test_a_pool_that_is_there_is_used(word_artifact) -> None:
    found = probe(word_artifact, 8, first=True)
    assert found.pop("pool") == 1
    assert {made["lanes"] for made in found.values()} == {1}


EXPECTING = """
import json, sys
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.engine.stack import Stack

found = []
with Stack(open_artifact(sys.argv[1]), threads=2) as stack:
    for rows in (8, 1, 8):
        stack.expect(rows)
        found.append(stack.lanes)
    for rows in (1, 4):
        stack.use(MemoryPlan(micro_batch=rows))
        found.append(stack.lanes)
print(json.dumps(found))
"""


def test_the_rows_to_come_set_the_lanes_whatever_the_first_batch_is(word_artifact) -> None:
    command = [sys.executable, "-c", EXPECTING, str(word_artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [2, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("rows", "threads", "lanes"),
    [(8, 1, 1), (1, 1, 1), (1, 2, 1), (2, 2, 2), (3, 2, 1), (7, 2, 2), (5, 4, 1), (7, 4, 4), (10, 4, 4)],
)
def test_lanes_are_filled_to_four_fifths(rows, threads, lanes) -> None:
    assert count_lanes(rows, threads) == lanes


@pytest.mark.parametrize(("tokens", "lanes"), [(0, 2), (23, 1), (24, 2), (512, 2)])
def test_a_lane_has_enough_tokens(tokens, lanes) -> None:
    assert count_lanes(8, 2, tokens=tokens) == lanes


def test_parts_run_at_the_same_time_and_keep_their_order() -> None:
    meeting = threading.Barrier(2, timeout=30)
    lanes = Lanes(2)
    assert lanes.each(lambda part: (meeting.wait(), part)[1], ["a", "b"]) == ["a", "b"]
    lanes.close()


def test_a_failure_waits_for_the_others_and_is_raised() -> None:
    done, lanes = threading.Event(), Lanes(2)

    def work(part: str) -> None:
        if part == "bad":
            raise ValueError(part)
        done.set()

    with pytest.raises(ValueError, match="bad"):
        lanes.each(work, ["bad", "good"])
    assert done.is_set()
    lanes.close()


def test_there_is_a_core() -> None:
    assert count_cores() >= 1
