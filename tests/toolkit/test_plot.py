"""Learning curves and confusion matrices of every kind of run, and what cannot be drawn."""

import json
import re

import msgspec
import numpy as np
import pytest
from flat import train
from typer.testing import CliRunner

from fleetune.device_runtime.contracts.evaluation_file import ClassFigures, Evaluated, EvaluationFile, added
from fleetune.device_runtime.contracts.run_file import EVALUATION, EVALUATIONS, ROUNDS, RUN
from fleetune.device_runtime.errors import ConfigError, DataError, StateError, UnknownName
from fleetune.toolkit.cli import app
from fleetune.toolkit.plot import plot, smoothed
from fleetune.toolkit.run_figures import Points, read_figures

pytest.importorskip("matplotlib")


def words(path):
    """All text of an SVG, which matplotlib puts into comments as it draws it."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def trained(folder, *, losses=(2.0, 1.0), **report):
    folder.mkdir(parents=True, exist_ok=True)
    report = {"steps": len(losses), "losses": list(losses), "accuracy": None, "eval_loss": None, **report}
    (folder / RUN).write_text(json.dumps({"report": report}))
    return folder


def evaluated(folder, *rows, **matrix):
    folder.mkdir(parents=True, exist_ok=True)
    log = b""
    for row in rows:
        log = added(log, Evaluated(num_samples=9, **row))
    (folder / EVALUATIONS).write_bytes(log)
    if matrix:
        last = EvaluationFile(num_samples=9, loss=1.0, accuracy=0.5, data="d", **matrix)
        (folder / EVALUATION).write_bytes(msgspec.json.encode(last))
    return folder


def classes(*names):
    return [ClassFigures(name=name, precision=0, recall=0, f1=0, support=0) for name in names]


def rounds(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ROUNDS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def aggregated(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    history = [
        {"round": n, "devices": 2, "loss": 2.0 - n, "accuracy": n / 2, "train_loss": 2.5 - n or None}
        for n in range(3)
    ]
    (folder / RUN).write_text(json.dumps({"report": {"rounds": 2, "history": history}}))
    return folder


def test_a_run_of_train_is_drawn_into_its_own_folder(word_artifact, word_file, tmp_path):
    options = {"batch_size": 8, "seq_len": 16, "lr": 0.02, "threads": 1}
    train(word_artifact, data=word_file, eval=word_file, out=tmp_path / "mine", steps=4, **options)
    curves, confusion = plot([tmp_path / "mine"])
    assert (curves, confusion) == (tmp_path / "mine" / "curves.svg", tmp_path / "mine" / "confusion.svg")
    assert {"mine, training", "mine, held out", "loss", "accuracy on held-out data", "step"} <= {
        *words(curves)
    }
    counts = np.array(json.loads((tmp_path / "mine" / EVALUATION).read_text())["confusion"])
    shown = words(confusion)
    assert {"a", "b", "c", "d", "e", f"mine: {counts.trace()} of 120 right"} <= {*shown}
    assert sum(int(text) for text in shown if text.isdecimal()) == 120
    before = curves.read_bytes()
    assert plot([tmp_path / "mine"])[0].read_bytes() == before


def test_runs_of_every_kind_share_a_picture(aggregated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = evaluated(trained(tmp_path / "one"), {"step": 1, "loss": 2.0, "accuracy": 0.1})
    two = trained(tmp_path / "two", accuracy=0.5, eval_loss=1.5)
    simulated = rounds(tmp_path / "fleet", {"round": 0, "accuracy": 0.1, "loss": 3.0}, {"round": 1})
    state = evaluated(
        tmp_path / "state",
        {"round": 0, "loss": 2.0, "accuracy": 0.1},
        classes=classes("on", "off"),
        confusion=[[3, 1], [0, 5]],
    )
    drawn = plot([one, two, aggregated, simulated, state])
    assert [str(path) for path in drawn] == ["plots/curves.svg", "plots/confusion-state.svg"]
    names = {*words(drawn[0])}
    assert {"one, training", "two, training", "home, training", "home, held out"} <= names
    assert {"one", "two", "home", "fleet", "state", "step", "round"} <= names
    assert {"on", "off", "3", "1", "5", "state: 8 of 9 right"} <= {*words(drawn[1])}


def test_the_figures_are_those_of_the_folder(aggregated, tmp_path):
    found = read_figures(aggregated)
    assert (found.unit, found.loss) == ("round", Points([0, 1, 2], [2.0, 1.0, 0.0]))
    assert found.accuracy == Points([0, 1, 2], [0.0, 0.5, 1.0])
    assert found.train_loss == Points([0, 1, 2], [2.5, 1.5, 0.5])
    alone = read_figures(trained(tmp_path / "old", accuracy=0.5, eval_loss=1.5))
    assert (alone.unit, alone.loss, alone.accuracy) == ("step", Points([2], [1.5]), Points([2], [0.5]))
    assert alone.train_loss == Points([1, 2], [2.0, 1.0])
    (tmp_path / "demo").mkdir()
    aggregated.rename(tmp_path / "demo" / "run")
    assert read_figures(tmp_path / "demo").accuracy == found.accuracy


def test_runs_of_one_name_are_told_apart_and_a_formula_is_a_name(tmp_path):
    runs = [trained(tmp_path / name / "run") for name in ("a$b$", "c")]
    (curves,) = plot(runs, out=tmp_path)
    assert {"a$b$/run, training", "c/run, training"} <= {*words(curves)}
    assert "Oblique" not in curves.read_text()  # as formulas are set


def test_a_png_is_one(tmp_path):
    (curves,) = plot([trained(tmp_path)], format="png")
    assert curves.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_not_measured_is_drawn_and_told(tmp_path):
    notes = []
    (curves,) = plot([trained(tmp_path / "run")], on_note=notes.append)
    assert notes == ["run: nothing was measured on held-out data (--eval): no score"]
    assert "not measured" in words(curves)


def test_a_long_run_is_averaged_to_the_last_step():
    found = smoothed(Points([*range(1, 104)], [float(n) for n in range(1, 104)]))
    assert (found.places[0], found.values[0]) == (2, 1.5)
    assert (found.places[-1], found.values[-1]) == (103, 103.0)
    assert smoothed(Points([], [])) == Points([], [])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda f: f.mkdir(), DataError, r"run: no run here; give the --out folder of train"),
        (lambda f: None, DataError, "no run here"),
        (lambda f: (f.mkdir(), (f / "ledger.sqlite").touch()), DataError, "has no figures yet"),
        (lambda f: (f.mkdir(), (f / EVALUATION).touch()), DataError, "figures of one evaluation, and no run"),
        (lambda f: (f.mkdir(), (f / RUN).write_bytes(b"\xff{")), DataError, r"run\.json: "),
        (lambda f: trained(f, losses=[1.0, None]), DataError, r"got `null` - at `\$.report.losses\[1\]`"),
        (lambda f: trained(f, losses=[float("nan")]), DataError, r"run\.json: JSON is malformed"),
        (lambda f: trained(f, accuracy=1.5), DataError, "accuracy 1.5 at 2; expected 0 to 1"),
        (lambda f: rounds(f, {"round": 1}), DataError, "no losses and no evaluations: nothing to draw"),
        (lambda f: rounds(f, {"round": 1, "loss": "x"}), DataError, r"rounds\.jsonl, line 1: Expected"),
        (
            lambda f: rounds(f, {"round": 1, "loss": 1.0}, {"round": 1, "loss": 2.0}),
            DataError,
            "loss: steps or rounds that go back",
        ),
        (
            lambda f: evaluated(
                f, {"step": 1, "loss": 1.0, "accuracy": 0.5}, classes=classes("on"), confusion=[[1, 2]]
            ),
            DataError,
            "the confusion matrix is not 1 x 1",
        ),
        (
            lambda f: evaluated(
                f, {"step": 1, "loss": 1.0, "accuracy": 0.5}, classes=classes("on"), confusion=[[-1]]
            ),
            DataError,
            "below 0",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, make, error, says):
    make(tmp_path / "run")
    with pytest.raises(error, match=says):
        plot([tmp_path / "run"])
    assert not (tmp_path / "run" / "curves.svg").exists()


def test_1e300_is_a_figure(tmp_path):
    plot([trained(tmp_path, losses=[1e300, 1.0])])


def test_wrong_requests_are_refused(tmp_path):
    run = trained(tmp_path / "run")
    with pytest.raises(UnknownName, match="no format 'jpg'; have: png, svg"):
        plot([run], format="jpg")
    with pytest.raises(ConfigError, match="given twice"):
        plot([run, tmp_path / "run" / "." / ""])
    with pytest.raises(ConfigError, match="plot needs a run"):
        plot([])
    with pytest.raises(StateError, match=r"run\.json: cannot be made: File exists"):
        plot([run], out=run / RUN)


def test_the_command_names_its_files_and_its_errors(tmp_path):
    run = trained(tmp_path / "run")
    done = CliRunner().invoke(app, ["plot", str(run), "--json"])
    assert json.loads(done.stdout) == {"results": [str(run / "curves.svg")]}
    assert "no score" in done.stderr
    assert CliRunner().invoke(app, ["plot", str(run)]).stdout == f"{run / 'curves.svg'}\n"
    wrong = CliRunner().invoke(app, ["plot", str(tmp_path / "none")])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith(f"fleetune: {tmp_path / 'none'}: no run here")
