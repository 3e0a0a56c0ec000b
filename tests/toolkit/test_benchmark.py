"""The benchmarks' own machinery, on what is small: the figures themselves are measured, not tested."""

import ast
from importlib import import_module

import pytest
from pretrained import minilm_artifact

from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.device_runtime.tables import Table
from fleetune.toolkit.benchmark import FOLDER, bench, load


def imported(path):
    """(module, name) of all that a file takes from us."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("fleetune.", "benchmarks.")):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_of_ours_is_there(path):
    load("measuring")
    for module, name in imported(path):
        assert hasattr(import_module(module), name), f"{module} has no {name}"


def test_what_is_asked_for_wrongly_is_named():
    with pytest.raises(UnknownName, match=r"no benchmark 'speed'; have: .*backends"):
        bench("speed")
    with pytest.raises(ConfigError, match="benchmark federation takes no --only and no --repeats"):
        bench("federation", only=["fp32"], repeats=2)
    with pytest.raises(ConfigError, match="--repeats 0: expected 1 or more"):
        bench("backends", repeats=0)
    with pytest.raises(UnknownName, match="no contender 'jax'; have: compile, executorch, floor"):
        bench("backends", only=["minilm", "jax"])


@pytest.mark.slow
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
