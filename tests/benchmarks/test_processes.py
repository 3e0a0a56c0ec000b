"""Workers on what is small: the figures themselves are measured, not tested."""

import json
import subprocess
import sys

import numpy as np
import pytest
import transformers
from pretrained import minilm_artifact

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.engine.footprint import footprint
from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.benchmark import FOLDER, load

SIZES = {"batch_size": 4, "seq_len": 64}
processes = load("measuring.processes")
run_worker, run_floor, FLOORS = processes.run_worker, processes.run_floor, processes.FLOORS


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Write the source of a worker and run it."""
    (tmp_path / "workers").mkdir()
    monkeypatch.setattr(processes, "FOLDER", tmp_path)

    def run(source, *words, **options):
        (tmp_path / "workers" / "made.py").write_text(source)
        return run_worker("made", *words, threads=1, **options)

    return run


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=20000, num_labels=77, **shape)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_worker_gives_its_last_line_and_the_time_to_its_first_step(worker):
    source = "import json, sys, time\nprint('hello')\nprint(json.dumps({'word': sys.argv[1], 'first_done': time.time()}))"
    found = worker(source, 7)
    assert found["word"] == "7"
    assert 0 < found["cold_start_s"] < 60


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("raise SystemExit('no compiler here')", {}, "worker made failed: no compiler here"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {}, "failed: SIGKILL"),
        ("import time; time.sleep(60)", {"limit_s": 0.5}, "timed out after 0.5 seconds"),
        ("", {"python": "/nowhere/python"}, "No such file"),
    ],
)
def test_a_worker_that_fails_says_why(worker, source, options, reason):
    with pytest.raises(ConfigError, match=reason):
        worker(source, **options)


def test_the_floor_counts_every_product_of_a_step():
    """Forward 8 a layer; backward 10 a layer, 3 fewer in the lowest: nobody needs the gradient of its input."""
    floor = load("workers.floor")
    assert len(floor.products(3)) == 3 * 8 + 2 * 10 + 7
    assert floor.products(2).count(("x", "square")) == 2 * 4 + 4 + 1


def test_the_floor_is_that_of_the_fastest_library():
    found = run_floor(2, 32, 64, 2, 2, 8, 3, threads=1)
    times = [found[f"{library}_ms"] for library in FLOORS]
    assert found["step_ms"] == min(times) > 0


@pytest.mark.parametrize("library", FLOORS)
def test_every_library_multiplies_the_same(library):
    floor = load("workers.floor")
    shapes = {"x": (4, 8), "square": (8, 8), "q": (2, 4, 3), "k": (2, 3, 4)}
    wanted = [("x", "square"), ("q", "k")]
    a, found = floor._draw(shapes), run_in_new_process(library, shapes, wanted)
    for left, right in wanted:
        np.testing.assert_allclose(found[f"{left}.{right}"], a[left] @ a[right], rtol=1e-4, atol=1e-5)


def run_in_new_process(library, shapes, wanted):
    """One step of the floor; onnxruntime sizes its pool only once in a process."""
    source = f"""
import json, sys
sys.path.insert(0, {str(FOLDER / "workers")!r})
import floor
found = floor.LIBRARIES[{library!r}]({shapes!r}, {wanted!r}, 1)()
print(json.dumps({{".".join(p): a.tolist() for p, a in found.items()}}))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "half", "recompute"])
def test_estimates_are_within_a_fifth_of_the_peak(mode):
    folder = minilm_artifact(77)
    found = run_worker("device_step", folder, *SIZES.values(), 3, 1, mode, threads=1)
    artifact = open_artifact(folder, verify=False)
    plan = dropping(6, range(1, 6, 2) if mode == "half" else ())
    expected = footprint(artifact, plan, memory=RECOMPUTE if mode == "recompute" else SAVE_ALL, **SIZES)
    # Of a table of which few rows are read, what lies between is mapped or not as the kernel likes: expected is all of it.
    unmapped = max(0.0, expected.weights - found["mapped_weights_mb"] * 2**20)
    assert 0.85 < (expected.peak - unmapped) / (found["peak_mb"] * 2**20) < 1.15


def test_torch_runs_as_many_layers_as_it_is_told(tiny_bert):
    torch_step = load("workers.torch_step")
    assert [torch_step.load(str(tiny_bert), n).config.num_hidden_layers for n in (0, 1)] == [2, 1]
    found = run_worker("torch_step", tiny_bert, 2, 8, 3, 1, 1, "", threads=1)
    assert found.keys() == {"step_ms", "peak_mb", "cold_start_s"}


@pytest.mark.slow
def test_executorchs_own_flow_learns(tiny_bert, tmp_path):
    pytest.importorskip("executorch")
    run_worker("joint_export", tiny_bert, tmp_path / "joint.pte", 2, 8, 0, threads=1)
    found = run_worker("joint_step", tmp_path / "joint.pte", 2, 8, 4, 1, threads=1)
    assert found["loss_last"] < found["loss_first"]
