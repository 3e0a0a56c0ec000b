"""The benchmarks' own machinery, on what is small: the figures themselves are measured, not tested."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import transformers
from pretrained import minilm_artifact

from fleetune.device_runtime.commands.inspect import estimate
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.device_runtime.tables import Table
from fleetune.toolkit import benchmark
from fleetune.toolkit.benchmark import FLOORS, FOLDER, bench, run_floor, run_worker

SIZES = {"batch_size": 4, "seq_len": 64}


def load(name):
    spec = importlib.util.spec_from_file_location(f"loaded_{name.replace('/', '_')}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Write the source of a worker and run it."""
    (tmp_path / "workers").mkdir()
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path)

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


def test_what_is_asked_for_wrongly_is_named():
    with pytest.raises(UnknownName, match=r"no benchmark 'speed'; have: .*backends"):
        bench("speed")
    with pytest.raises(ConfigError, match="benchmark federation takes no --only and no --repeats"):
        bench("federation", only=["fp32"], repeats=2)
    with pytest.raises(ConfigError, match="--repeats 0: expected 1 or more"):
        bench("backends", repeats=0)
    with pytest.raises(UnknownName, match="no contender 'jax'; have: compile, executorch, floor"):
        bench("backends", only=["minilm", "jax"])


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
    floor = load("workers/floor")
    assert len(floor.products(3)) == 3 * 8 + 2 * 10 + 7
    assert floor.products(2).count(("x", "square")) == 2 * 4 + 4 + 1


def test_the_floor_is_that_of_the_fastest_library():
    found = run_floor(2, 32, 64, 2, 2, 8, 3, threads=1)
    times = [found[f"{library}_ms"] for library in FLOORS]
    assert found["step_ms"] == min(times) > 0


@pytest.mark.parametrize("library", FLOORS)
def test_every_library_multiplies_the_same(library):
    floor = load("workers/floor")
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


@pytest.mark.parametrize("mode", ["full", "half", "recompute"])
def test_estimates_are_within_a_fifth_of_the_peak(mode):
    folder = minilm_artifact(77)
    found = run_worker("device_step", folder, *SIZES.values(), 3, 1, mode, threads=1)
    artifact = open_artifact(folder, verify=False)
    plan = dropping(6, range(1, 6, 2) if mode == "half" else ())
    expected = estimate(artifact, plan, name=mode, recompute=mode == "recompute", **SIZES)
    assert 0.8 < expected.peak_mb / (found["peak_mb"] * 2**20 / 1e6) < 1.2


def test_torch_runs_as_many_layers_as_it_is_told(tiny_bert):
    torch_step = load("workers/torch_step")
    assert [torch_step.load(str(tiny_bert), n).config.num_hidden_layers for n in (0, 1)] == [2, 1]
    found = run_worker("torch_step", tiny_bert, 2, 8, 3, 1, 1, "", threads=1)
    assert found.keys() == {"step_ms", "peak_mb", "cold_start_s"}


@pytest.mark.slow
def test_executorchs_own_flow_learns(tiny_bert, tmp_path):
    pytest.importorskip("executorch")
    run_worker("joint_export", tiny_bert, tmp_path / "joint.pte", 2, 8, 0, threads=1)
    found = run_worker("joint_step", tmp_path / "joint.pte", 2, 8, 4, 1, threads=1)
    assert found["loss_last"] < found["loss_first"]


def test_what_an_artifact_holds_beside_its_tensors():
    """Of MiniLM: tokenizer, golden step, manifest and graphs; the aim for a model is 3 MB."""
    folder = minilm_artifact(77)
    beside = (
        "tokenizer.json",
        "golden.safetensors",
        "manifest.json",
        *(p.name for p in folder.glob("graphs/*")),
    )
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    overhead = load("export").folder_overhead(folder)
    assert 0 <= overhead - sum(sizes[name] for name in beside) < 50_000
    assert overhead < 3e6


class TestBackends:
    """Two repeats with stand-ins for the contenders."""

    @pytest.fixture
    def backends(self, monkeypatch):
        module = load("backends")
        times = iter(range(10, 1000, 10))

        def refuse(place):
            raise ConfigError("not installed")

        def fail(place):
            raise ConfigError("crashed")

        def run(place):
            return {"step_ms": float(next(times)), "peak_mb": 1.0}

        stand_ins = {
            "floor": module.Contender(run),
            "torch": module.Contender(run),
            "onnx": module.Contender(run),
            "compile": module.Contender(fail),
            "ort-training": module.Contender(run, refuse),
            "joint": module.Contender(run, places=("minilm_full",), once=True),
        }
        monkeypatch.setattr(module, "CONTENDERS", Table("contender", stand_ins))
        return module

    def test_figures_are_flat_and_ratios_are_of_one_repeat(self, backends):
        said = []
        found = backends.measure(said.append, only=["minilm"], repeats=2)
        assert not any(isinstance(value, dict) for value in found.values())
        first, second = (
            30 / 20,
            100 / 90,
        )  # seven runs in the first repeat, then six: floor, torch and onnx first
        assert found["minilm_full_onnx_over_torch"] == pytest.approx((first + second) / 2, abs=1e-3)
        assert found["minilm_half_torch_over_floor"] > 1
        assert found["minilm_full_joint_over_torch"] == 40 / 20
        assert "minilm_half_joint_step_ms" not in found
        assert any(line.startswith("minilm_half onnx") for line in said)

    def test_who_does_not_run_says_why_and_is_not_run_again(self, backends):
        said = []
        found = backends.measure(said.append, only=["minilm"], repeats=2)
        reasons = {name: value for name, value in found.items() if name.endswith("_reason")}
        assert reasons == {
            "minilm_full_compile_reason": "crashed",
            "minilm_half_compile_reason": "crashed",
            "minilm_full_ort-training_reason": "not installed",
            "minilm_half_ort-training_reason": "not installed",
        }
        assert sum("crashed" in line for line in said) == 2

    def test_only_names_contenders_and_models(self, backends):
        found = backends.measure(lambda line: None, only=["onnx", "minilm"], repeats=1)
        measured = {name for name in found if name.endswith("_step_ms")}
        assert measured == {"minilm_full_onnx_step_ms", "minilm_half_onnx_step_ms"}
