"""The table of language models, of what pretended processes measured: budgets, and ratios to torch and to the weights."""

from pathlib import Path
from typing import Any

import pytest

from fleetune.toolkit.benchmark import load

LEAST = {"int8": 720.0, "int4": 610.0}


def test_a_row_says_what_its_processes_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load("llm")
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

    def timed(command: list[str], threads: int) -> tuple[float, float]:
        if "export" in command:
            out = Path(command[-1])
            out.mkdir(parents=True)
            (out / "base").write_bytes(bytes(10_000_000))
        return 30.0, 3900.0

    monkeypatch.setattr(llm, "run_worker", run_worker)
    monkeypatch.setattr(llm, "timed", timed)
    said: list[str] = []
    found = llm.measure(said.append, only=["0.5b"])
    assert budgets == {"int8": 721.0, "int4": 700}
    row = found["rows"][1]
    assert row["case"] == "0.5b int4"
    assert (row["artifact_mb"], row["artifact_over_fp32"], row["export_peak_over_fp32"]) == (
        10.0,
        0.005,
        1.95,
    )
    assert (row["peak_over_torch"], row["step_over_torch"], row["first_step_over_torch"]) == (0.12, 0.5, 0.5)
    assert any("0.5b int4" in line for line in said)
