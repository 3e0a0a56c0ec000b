"""The table of language models, of what pretended processes measured: budgets, and ratios to torch and to the weights."""

from pathlib import Path
from typing import Any

import pytest

from fleetune.device_runtime.errors import UnknownName
from fleetune.toolkit.benchmark import load

LEAST = {"int8": 720.0, "int4": 610.0}


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark; what an export, a check and a merge take, and what is there afterwards, is pretended."""
    module = load("llm")

    def timed(command: list[str], threads: int) -> tuple[float, float]:
        if "export" in command:
            out = Path(command[-1])
            out.mkdir(parents=True)
            (out / "base").write_bytes(bytes(10_000_000))
        return 30.0, {"export": 3900.0, "selfcheck": 800.0, "merge": 2600.0}[command[3]]

    monkeypatch.setattr(module, "timed", timed)
    monkeypatch.setattr(module, "_tuned", lambda folder: folder / "adapter")
    monkeypatch.setattr(module, "_memory_mb", lambda: 25_000.0)
    return module


def test_a_row_says_what_its_processes_measured(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: dict[str, float] = {}

    def run_worker(name: str, *words: Any, threads: int) -> dict[str, Any]:
        if name == "make_language_model":
            return {"parameters": 500_000_000}
        if name == "torch_language_step":
            return {"step_ms": 4000.0, "peak_mb": 5000.0, "cold_start_s": 8.0}
        storage = Path(words[0]).name
        if not words[-1]:
            return {"least_mb": LEAST[storage], "plenty_mb": 3000.0}
        budgets[storage] = words[-1]
        return {"step_ms": 2000.0, "peak_mb": 600.0, "cold_start_s": 4.0, "picked": "one row"}

    monkeypatch.setattr(llm, "run_worker", run_worker)
    said: list[str] = []
    found = llm.measure(said.append, only=["0.5b"])
    assert budgets == {"int8": 720.0, "int4": 700}
    row = found["rows"][1]
    assert row["case"] == "0.5b int4"
    assert (row["artifact_mb"], row["artifact_over_fp32"], row["export_peak_over_fp32"]) == (
        10.0,
        0.005,
        1.95,
    )
    assert (row["peak_over_torch"], row["step_over_torch"], row["first_step_over_torch"]) == (0.12, 0.5, 0.5)
    assert (row["selfcheck_peak_mb"], row["merge_peak_mb"]) == (800, 2600)
    assert any("0.5b int4" in line for line in said)


@pytest.mark.parametrize(("memory_mb", "asked"), [(15_000.0, []), (25_000.0, ["torch_language_step"])])
def test_torch_runs_where_it_fits_and_one_storage_where_one_is_asked_for(
    llm: Any, monkeypatch: pytest.MonkeyPatch, memory_mb: float, asked: list[str]
) -> None:
    calls: list[tuple[str, str]] = []

    def run_worker(name: str, *words: Any, threads: int) -> dict[str, Any]:
        calls.append((name, Path(words[0]).name))
        figures = {"step_ms": 4000.0, "peak_mb": 900.0, "cold_start_s": 8.0}
        if name == "make_language_model":
            return {"parameters": 3_200_000_000}
        return figures if name == "torch_language_step" else {**figures, "picked": "", "least_mb": 900.0}

    monkeypatch.setattr(llm, "run_worker", run_worker)
    monkeypatch.setattr(llm, "_memory_mb", lambda: memory_mb)
    row = llm.measure(lambda _: None, only=["3b", "int4"], repeats=1)["rows"][0]
    assert [name for name, _ in calls if name.startswith("torch")] == asked
    assert (row["step_over_torch"] is None) == (not asked)
    assert {folder for name, folder in calls if name == "budget_run"} == {"int4"}


def test_what_is_not_measured_is_refused_by_name(llm: Any) -> None:
    with pytest.raises(UnknownName, match=r"no shape or storage '7b'; have: 0\.5b, 135m"):
        llm.measure(lambda _: None, only=["7b"])
