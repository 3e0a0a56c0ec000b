"""Comparisons of runs by hand: every figure is known beforehand."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from fleetune.device_runtime.errors import ConfigError, DataError, UnknownName
from fleetune.toolkit.cli import app
from fleetune.toolkit.simulation.charts import draw_run
from fleetune.toolkit.simulation.compare import compare
from fleetune.toolkit.simulation.curves import averaged, read_curve
from fleetune.toolkit.simulation.records import (
    Choice,
    DeviceRecord,
    RoundRecord,
    append,
    finite,
    mend,
    read_lines,
    write_lines,
)

SLOW = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8]
FAST = [0.1, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
WEAK = [0.1, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
"""Averaged: FAST reaches 0.76 at its fourth version (0.733) not, at its fifth (0.8) it does."""


def write_run(root, name, accuracies, *, seed=0, round_s=100.0, peak_mb=400.0):
    folder = root / f"{name}-{seed}"
    folder.mkdir(parents=True)
    rounds = [
        RoundRecord(
            round=r,
            time_s=round_s * r,
            accuracy=accuracy,
            devices=2 * bool(r),
            bytes_up=1000 * bool(r),
            bytes_down=2000 * bool(r),
            compute_s=50.0 * bool(r),
            energy_j=300.0 * bool(r),
            peak_mb=peak_mb * bool(r),
            peak_mb_mean=peak_mb / 2 * bool(r),
            choices=(Choice(device="pi", profile="pi-4", policy="full"),) if r else (),
        )
        for r, accuracy in enumerate(accuracies)
    ]
    write_lines(folder / "rounds.jsonl", rounds)
    write_lines(
        folder / "devices.jsonl", [DeviceRecord(device="pi", profile="pi-4", samples=9, classes=2, peak_mb=5)]
    )
    report = {"name": name, "seed": seed, "rounds": len(rounds) - 1, "finished": True, "devices": 2}
    (folder / "run.json").write_text(json.dumps({"artifact": "a", "report": report, "arguments": {}}))
    return folder


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    for seed, round_s in ((0, 100.0), (1, 110.0)):
        write_run(root, "fedlora", SLOW, seed=seed, round_s=round_s)
        write_run(root, "auto", FAST, seed=seed, round_s=round_s, peak_mb=100.0)
    write_run(root, "weak", WEAK)
    return root


def arm_of(found, name):
    return next(arm for arm in found.arms if arm.name == name)


def test_averages_take_the_neighbours_that_there_are():
    assert averaged(read_accuracy([0.0, 0.3, 0.6, 0.0])).tolist() == pytest.approx([0.15, 0.3, 0.3, 0.3])
    assert averaged(read_accuracy([0.5])).tolist() == [0.5]


def read_accuracy(values):
    import numpy as np

    return np.array(values)


def test_costs_to_a_target_and_ratios_are_those_worked_by_hand(runs):
    found = compare(runs, of="fedlora", to=(0.95,))
    assert [arm.name for arm in found.arms] == ["fedlora", "auto", "weak"]
    slow, fast = (arm_of(found, name).targets[0] for name in ("fedlora", "auto"))
    assert slow.accuracy == pytest.approx(0.76)
    assert (slow.costs["time_s"].mean, fast.costs["time_s"].mean) == (
        pytest.approx(105 * 7),
        pytest.approx(105 * 4),
    )
    assert fast.costs["time_s"].std == pytest.approx(4 * 10 / 2**0.5)
    assert (fast.costs["compute_s"].mean, fast.costs["bytes_up"].mean) == (200.0, 4000.0)
    assert (fast.costs["bytes_down"].mean, fast.costs["energy_j"].mean) == (8000.0, 1200.0)
    assert (fast.costs["peak_mb"].mean, fast.costs["peak_mb_mean"].mean) == (100.0, 50.0)
    assert fast.ratios == pytest.approx(
        dict.fromkeys(("time_s", "compute_s", "bytes_up", "bytes_down", "bytes", "energy_j"), 4 / 7)
        | {"peak_mb": 0.25, "peak_mb_mean": 0.25}
    )
    assert arm_of(found, "auto").final.mean == pytest.approx(0.8)
    assert all(ratio == 1 for ratio in slow.ratios.values())


def test_a_target_that_is_not_reached_is_no_number(runs):
    weak = arm_of(compare(runs, of="fedlora"), "weak")
    for target in weak.targets:
        assert (target.reached, target.seeds, target.best) == (0, 1, pytest.approx(0.5))
        assert {*target.costs.values(), *target.ratios.values()} == {None}


def test_an_arm_that_reached_it_in_some_seeds_has_no_mean(runs):
    write_run(runs, "weak", FAST, seed=1)
    target = arm_of(compare(runs, of="fedlora"), "weak").targets[0]
    assert (target.reached, target.seeds) == (1, 2)
    assert (target.costs["time_s"], target.ratios["time_s"]) == (None, None)
    write_run(runs, "fedlora", SLOW, seed=2)
    write_run(runs, "weak", FAST, seed=2)
    ratio = arm_of(compare(runs, of="fedlora"), "weak").targets[0].ratios["bytes_up"]
    assert ratio == pytest.approx(4 / 7), "of two that did and one that did not, the median did"


def test_the_final_accuracy_is_the_mean_of_the_last_three(tmp_path):
    assert read_curve(write_run(tmp_path, "ref", [0.9, 0.6, None, 0.7, 0.8])).final == pytest.approx(0.7)
    assert read_curve(write_run(tmp_path, "short", [0.6, 0.8])).final == pytest.approx(0.7)


def test_each_seed_is_measured_by_the_reference_of_its_own(tmp_path):
    write_run(tmp_path, "ref", [0.0, 0.4, 0.4, 0.4], seed=0)
    write_run(tmp_path, "ref", [0.0, 0.8, 0.8, 0.8], seed=1)
    write_run(tmp_path, "arm", [0.0, 0.4, 0.4, 0.4], seed=0)
    write_run(tmp_path, "arm", [0.0, 0.4, 0.4, 0.4], seed=1)
    target = arm_of(compare(tmp_path, of="ref"), "arm").targets[0]
    assert (target.reached, target.accuracy) == (1, pytest.approx(0.95 * 0.6))


def test_versions_that_were_not_evaluated_cost_and_do_not_count(tmp_path):
    write_run(tmp_path, "ref", [0.1, None, 0.8, None, 0.8, 0.8])
    curve = read_curve(tmp_path / "ref-0")
    assert curve.costs["time_s"].tolist() == [0.0, 200.0, 400.0, 500.0]
    assert curve.costs["bytes_up"].tolist() == [0.0, 2000.0, 4000.0, 5000.0]
    assert curve.costs["bytes"].tolist() == [0.0, 6000.0, 12000.0, 15000.0]
    assert curve.final == pytest.approx(0.8)
    assert compare(tmp_path).arms[0].targets[0].costs["time_s"].mean == 400.0


def test_a_target_that_version_0_has_costs_nothing_and_has_no_ratio(tmp_path):
    write_run(tmp_path, "ref", [0.8, 0.8, 0.8])
    write_run(tmp_path, "arm", [0.8, 0.8, 0.8])
    target = arm_of(compare(tmp_path, of="ref"), "arm").targets[0]
    assert (target.costs["time_s"].mean, target.ratios["time_s"]) == (0.0, None)


def test_runs_without_a_counterpart_are_left_out_and_told(runs):
    write_run(runs, "weak", WEAK, seed=7)
    found = compare(runs, of="fedlora")
    assert arm_of(found, "weak").seeds == [0]
    assert found.notes == ["weak: seeds 7 are left out, fedlora has no run of them"]


def spoil(folder, line, **fields):
    path = folder / "rounds.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line - 1] |= fields
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"accuracy": 1e300}, r"line 3: accuracy 1e\+300; expected 0 to 1"),
        ({"accuracy": -0.1}, "line 3: accuracy -0.1"),
        ({"accuracy": float("nan")}, "line 3: JSON is malformed"),
        ({"time_s": -1}, "line 3: time_s -1.0; expected a finite number from 0"),
        ({"time_s": 50}, "line 3: time_s 50.0 after 100.0; time goes back"),
        ({"compute_s": -5}, "line 3: compute_s -5.0"),
        ({"bytes_up": None}, "line 3: Expected `int`, got `null`"),
        ({"round": "x"}, "line 3: Expected `int`, got `str`"),
    ],
)
def test_figures_that_cannot_be_are_refused_with_their_line(tmp_path, fields, said):
    folder = write_run(tmp_path, "ref", SLOW)
    spoil(folder, 3, **fields)
    with pytest.raises(DataError, match=said):
        compare(tmp_path)


def test_what_cannot_be_compared_is_told(runs, tmp_path):
    with pytest.raises(UnknownName, match="no arm 'fedit'; have: auto, fedlora, weak"):
        compare(runs, of="fedit")
    for share in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="expected shares above 0, at most 1"):
            compare(runs, to=(share,))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no run of fleetune simulate here"):
        compare(tmp_path / "empty")
    shutil.copytree(runs / "weak-0", runs / "again")
    with pytest.raises(ConfigError, match="both are arm 'weak' with seed 0"):
        compare(runs)
    write_run(tmp_path / "zero", "ref", [0.0, 0.0])
    with pytest.raises(ConfigError, match="ends at an accuracy of 0"):
        compare(tmp_path / "zero")
    write_run(tmp_path / "never", "ref", [None, None])
    with pytest.raises(DataError, match="no version was evaluated"):
        compare(tmp_path / "never")


def test_the_command_prints_a_table_and_json(runs):
    shown = CliRunner().invoke(app, ["compare", str(runs), "--of", "fedlora", "--to", "0.95"])
    assert shown.exit_code == 0, shown.output
    assert "to 95 % of the final accuracy of fedlora, 0.760" in shown.stdout
    (weak,) = (line for line in shown.stdout.splitlines() if line.startswith("weak"))
    assert weak.endswith("0 of 1   not reached, at best 0.500")
    (fast,) = (line for line in shown.stdout.splitlines() if line.startswith("auto"))
    assert "7.0 min ±7 % (0.57)" in fast
    found = json.loads(CliRunner().invoke(app, ["compare", str(runs), "--json"]).stdout)
    assert found["of"] == "auto", "the first run's, in the order of their names"
    wrong = CliRunner().invoke(app, ["compare", str(runs), "--to", "most"])
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)


def test_charts_are_svg_and_the_same_each_time(runs, tmp_path):
    for name in ("a", "b"):
        found = compare(runs, of="fedlora", to=(0.95,), charts=tmp_path / name)
        assert found.charts == [str(tmp_path / name / file) for file in ("accuracy.svg", "cost-95.svg")]
    for file in ("accuracy.svg", "cost-95.svg"):
        content = (tmp_path / "a" / file).read_bytes()
        assert content.startswith(b"<?xml")
        assert content == (tmp_path / "b" / file).read_bytes()
    costs = (tmp_path / "a" / "cost-95.svg").read_text()
    assert all(f"<!-- {word} -->" in costs for word in ("fedlora", "weak", "not reached", "peak MB"))


def test_a_run_is_drawn_into_its_own_folder(runs):
    drawn = draw_run(runs / "auto-0")
    assert [path.name for path in drawn] == ["accuracy.svg", "arms.svg", "bytes.svg", "memory.svg"]
    assert "<!-- full -->" in (runs / "auto-0" / "arms.svg").read_text()
    assert "<!-- pi-4 -->" in (runs / "auto-0" / "memory.svg").read_text()


def test_a_line_that_a_kill_cut_off_is_left_out_and_mended(tmp_path):
    path = tmp_path / "rounds.jsonl"
    assert mend(path, RoundRecord) == []
    for r in range(2):
        append(path, RoundRecord(round=r, time_s=float(r)))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"round": 2, "time')
    assert [row.round for row in read_lines(path, RoundRecord)] == [0, 1]
    assert len(mend(path, RoundRecord)) == 2
    assert path.read_bytes() == whole
    append(path, RoundRecord(round=2, time_s=2.0))
    assert [row.round for row in read_lines(path, RoundRecord)] == [0, 1, 2]


def test_what_is_not_finite_is_not_written():
    assert [finite(value) for value in (1.5, None, float("nan"), float("inf"))] == [1.5, None, None, None]
