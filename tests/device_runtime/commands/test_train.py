import json
import os
import shutil
import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from flat import train
from paths import ROOT
from policies import BY_NAME
from pretended import PretendedSystem

from fleetune.device_runtime.commands import train as training
from fleetune.device_runtime.commands.peak_memory import peak_rss_mb
from fleetune.device_runtime.contracts.adapters import load_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError, StateError, UnknownName
from fleetune.device_runtime.methods.policies import POLICIES
from fleetune.device_runtime.rules.gate import Pause

OPTIONS = {"batch_size": 8, "seq_len": 16, "lr": 0.02, "threads": 1}


class Killed(BaseException):
    """No handler of errors may catch it."""


def killer(step):
    def on_step(report):
        if report.step == step:
            raise Killed

    return on_step


def adapter_of(run, artifact):
    return load_peft(run / "adapter", open_artifact(artifact).manifest)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_leaves_an_adapter_and_its_record(word_artifact, word_file, tmp_path):
    seen = []
    report = train(
        word_artifact,
        data=word_file,
        eval=word_file,
        out=tmp_path / "run",
        epochs=6,
        on_step=seen.append,
        **OPTIONS,
    )
    assert report.steps == len(seen) == len(report.losses) == 6 * 15
    assert (report.loss_first, report.loss_last) == (report.losses[0], report.losses[-1])
    assert report.loss_last < report.loss_first / 2
    assert report.accuracy > 0.9
    assert report.eval_loss < report.loss_first
    assert report.mean_active_layers == 4
    assert report.num_samples == 120
    assert report.peak_rss_mb == pytest.approx(peak_rss_mb(), rel=0.1)
    assert report.step_ms_median > 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "adapter",
        "checkpoint.safetensors",
        "evaluation.csv",
        "evaluation.json",
        "evaluations.jsonl",
        "run.json",
    ]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["artifact_digest"] == open_artifact(word_artifact).digest
    assert run["arguments"]["work"]["optimizer"]["lr"] == 0.02
    assert run["arguments"]["data"] == str(word_file)
    assert run["report"]["accuracy"] == report.accuracy
    assert not same(adapter_of(tmp_path / "run", word_artifact), open_artifact(word_artifact).adapter())


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "coto"])
def test_a_killed_run_started_again_ends_as_if_it_had_not_been(word_artifact, word_file, tmp_path, policy):
    spec = {
        "policy" if name == "name" else name: value
        for name, value in msgspec.structs.asdict(BY_NAME[policy]).items()
    }
    spec["depth_shape"] = spec.pop("shape")
    options = {**OPTIONS, **spec, "data": word_file, "steps": 20, "checkpoint_every": 4}
    straight = train(word_artifact, out=tmp_path / "straight", **options)
    with pytest.raises(Killed):
        train(word_artifact, out=tmp_path / "cut", on_step=killer(10), **options)
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    seen = []
    resumed = train(word_artifact, out=tmp_path / "cut", on_step=seen.append, **options)
    assert [r.step for r in seen] == list(range(8, 20))
    assert resumed.losses == straight.losses
    assert resumed.mean_active_layers == straight.mean_active_layers
    assert same(adapter_of(tmp_path / "cut", word_artifact), adapter_of(tmp_path / "straight", word_artifact))


@pytest.mark.parametrize(
    "changes", [{"gates": "row"}, {"protect": "effect"}, {"gates": "row", "protect": "effect"}]
)
def test_gates_and_effects_go_on_where_they_were(word_artifact, word_file, tmp_path, changes):
    options = {**OPTIONS, "data": word_file, "policy": "bernoulli", "drop": 0.5, "protected": 2, **changes}
    options |= {"schedule": "falling", "horizon": 15, "steps": 20, "checkpoint_every": 4}
    straight = train(word_artifact, out=tmp_path / "straight", **options)
    with pytest.raises(Killed):
        train(word_artifact, out=tmp_path / "cut", on_step=killer(10), **options)
    kept = tmp_path / "cut" / "cache" / "skip-effects.json"
    assert kept.exists() == ("protect" in changes)
    kept.unlink(missing_ok=True)  # the checkpoint has them
    resumed = train(word_artifact, out=tmp_path / "cut", **options)
    assert resumed.losses == straight.losses
    assert resumed.mean_active_layers == straight.mean_active_layers
    assert same(adapter_of(tmp_path / "cut", word_artifact), adapter_of(tmp_path / "straight", word_artifact))
    assert not kept.exists()


def test_without_lora_there_is_nothing_to_switch_off(word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "policy": "coto", "drop": 0.5, "steps": 4}
    with pytest.raises(ConfigError, match=r"layer \d has no LoRA to switch off"):
        train(word_artifact, out=tmp_path, **options)


def test_a_run_that_is_paused_and_resumed_is_the_run_that_is_not(word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "eval": word_file, "steps": 12, "policy": "exact-k", "drop": 0.5}
    straight = train(word_artifact, out=tmp_path / "straight", **options)
    system, told, taken = PretendedSystem(tmp_path / "host"), [], []
    system.zone(50)

    def on_step(report):
        taken.append(report.step)
        if report.step in (3, 7, 11):
            system.zone(90)

    def on_note(pause):
        if not isinstance(pause, Pause):
            return
        told.append((str(pause).split(" after")[0], list(taken)))
        if pause.reasons:
            system.zone(50)

    rules = {
        "root": str(system.root),
        "temperature": {"max_c": 70},
        "period_s": 0,
        "resume_after_s": 0,
    }
    paused = train(
        word_artifact, out=tmp_path / "paused", rules=rules, on_step=on_step, on_note=on_note, **options
    )
    shut = "paused: temperature 90.0 C is above 70 C"
    assert told == [(text, list(range(last + 1))) for last in (3, 7, 11) for text in (shut, "resumed")], (
        "it pauses before the next step, and before the evaluation"
    )
    assert paused.losses == straight.losses
    assert (paused.accuracy, paused.eval_loss) == (straight.accuracy, straight.eval_loss)
    assert same(
        adapter_of(tmp_path / "paused", word_artifact), adapter_of(tmp_path / "straight", word_artifact)
    )
    assert (paused.pauses, straight.pauses, straight.paused_s) == (3, 0, 0.0)
    assert json.loads((tmp_path / "paused" / "run.json").read_text())["arguments"]["rules"] == rules


def test_a_run_killed_in_a_pause_goes_on_from_the_step_it_paused_at(word_artifact, word_file, tmp_path):
    system = PretendedSystem(tmp_path / "host")
    options = {**OPTIONS, "data": word_file, "steps": 8, "checkpoint_every": 50}
    straight = train(word_artifact, out=tmp_path / "straight", **options)

    def on_step(report):
        system.zone(90 if report.step == 4 else 50)

    def on_note(pause):
        if "battery" in pause.reasons:
            raise Killed
        system.supply("BAT0", type="Battery", capacity=3)

    rules = {
        "root": str(system.root),
        "temperature": {"max_c": 70},
        "battery": {"min_percent": 40},
        "period_s": 0,
    }
    with pytest.raises(Killed):
        train(word_artifact, out=tmp_path / "run", rules=rules, on_step=on_step, on_note=on_note, **options)
    seen = []
    resumed = train(word_artifact, out=tmp_path / "run", on_step=seen.append, **options)
    assert [r.step for r in seen] == list(range(5, 8))
    assert resumed.losses == straight.losses


def test_other_arguments_do_not_take_over_a_run_killed_or_finished(word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "out": tmp_path, "steps": 6, "checkpoint_every": 2}
    with pytest.raises(Killed):
        train(word_artifact, on_step=killer(3), **options)
    words = (
        r"a checkpoint of another run \(seed: 0 there, 1 here\); use another output folder, or .*--no-resume"
    )
    for _ in range(2):
        with pytest.raises(ConfigError, match=words):
            train(word_artifact, **{**options, "seed": 1})
        train(word_artifact, **options)
    seen = []
    train(word_artifact, **{**options, "seed": 1}, resume=False, on_step=seen.append)
    assert len(seen) == 6


def test_the_same_command_trains_a_finished_run_no_further(word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "eval": word_file, "out": tmp_path, "steps": 6}
    first, before = train(word_artifact, **options), adapter_of(tmp_path, word_artifact)
    notes = []
    again = train(word_artifact, on_step=killer(0), on_note=notes.append, **options)
    assert again == first
    assert notes[0] == f"{tmp_path}: all 6 steps were taken before; --no-resume trains anew"
    assert notes[1:-1] == [f"measuring on {len(word_file.read_text().splitlines()) - 1} held-out samples"]
    assert same(adapter_of(tmp_path, word_artifact), before)
    unmeasured = train(word_artifact, on_step=killer(0), **{**options, "eval": None})
    assert (unmeasured.accuracy, unmeasured.losses) == (None, first.losses)


@pytest.mark.parametrize("policy", ["full", "exact-k", "cyclic"])
def test_more_steps_go_on_from_the_end_as_if_they_had_been_asked_for_at_first(
    word_artifact, word_file, tmp_path, policy
):
    options = {**OPTIONS, "data": word_file, "policy": policy, "drop": 0.5 * (policy != "full")}
    options |= {"period": 3 * (policy == "cyclic")}
    straight = train(word_artifact, out=tmp_path / "straight", epochs=2, **options)
    train(word_artifact, out=tmp_path / "run", steps=7, **options)
    seen, notes = [], []
    longer = train(
        word_artifact, out=tmp_path / "run", epochs=2, on_step=seen.append, on_note=notes.append, **options
    )
    assert ([r.step for r in seen], notes) == (list(range(7, 30)), ["goes on from step 7 of 30"])
    assert longer.losses == straight.losses
    assert same(adapter_of(tmp_path / "run", word_artifact), adapter_of(tmp_path / "straight", word_artifact))
    with pytest.raises(ConfigError, match="30 steps are taken there, and 7 are asked for here"):
        train(word_artifact, out=tmp_path / "run", steps=7, **options)


def test_a_decayed_rate_goes_no_further(word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "out": tmp_path, "decay": "linear"}
    train(word_artifact, steps=4, **options)
    with pytest.raises(ConfigError, match=r"another run \(steps: 4 there, 8 here"):
        train(word_artifact, steps=8, **options)


def test_folders_that_hold_something_else_are_refused(word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "steps": 2}
    (tmp_path / "federation").mkdir()
    (tmp_path / "federation" / LEDGER).write_bytes(b"")
    for resume in (True, False):
        with pytest.raises(ConfigError, match=r"federation: holds a federation \(ledger\.sqlite\)"):
            train(word_artifact, out=tmp_path / "federation", resume=resume, **options)
    train(word_artifact, out=tmp_path / "old", **options)
    (tmp_path / "old" / "checkpoint.safetensors").unlink()  # as 0.1.0 left a run
    with pytest.raises(ConfigError, match=r"old: holds a finished run, and no .* or resume=False"):
        train(word_artifact, out=tmp_path / "old", **options)
    assert train(word_artifact, out=tmp_path / "old", resume=False, **options).steps == 2


SIGNALLED = """
import os, sys
from fleetune.device_runtime.training.trainer import Trainer
take = Trainer.step
def step(self):
    if self.step_index == 4:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return take(self)
Trainer.step = step
from fleetune.toolkit.cli import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_command_between_two_steps_and_the_same_goes_on(
    word_artifact, word_file, tmp_path, number, code
):
    words = ["train", str(word_artifact), "--data", str(word_file), "--out", str(tmp_path / "run")]
    words += ["--steps", "9", "--batch-size", "8", "--seq-len", "16", "--lr", "0.02", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SIGNAL": str(int(number))}
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "stopping after this step; once more to stop at once\n" in done.stdout
    assert "stopped at step 5 of 9; the same command goes on\n" in done.stdout
    options, seen = {**OPTIONS, "data": word_file, "steps": 9}, []
    resumed = train(word_artifact, out=tmp_path / "run", on_step=seen.append, **options)
    assert [r.step for r in seen] == list(range(5, 9))
    assert resumed.losses == train(word_artifact, out=tmp_path / "straight", **options).losses


def test_recompute_and_a_peft_folder_to_start_from(word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "steps": 4}
    train(word_artifact, out=tmp_path / "first", **options)
    second = train(word_artifact, out=tmp_path / "second", adapter=tmp_path / "first" / "adapter", **options)
    frugal = train(
        word_artifact,
        out=tmp_path / "third",
        adapter=tmp_path / "first" / "adapter",
        recompute=True,
        **options,
    )
    assert frugal.losses == pytest.approx(second.losses, rel=1e-5)
    assert second.losses[0] < train(word_artifact, out=tmp_path / "fourth", **options).losses[0]


def test_suffix_trains_the_upper_layers_only(word_artifact, word_file, tmp_path):
    report = train(word_artifact, data=word_file, out=tmp_path, policy="suffix", drop=0.5, steps=3, **OPTIONS)
    manifest = open_artifact(word_artifact).manifest
    before, after = open_artifact(word_artifact).adapter(), adapter_of(tmp_path, word_artifact)
    changed = {t.layer for t in manifest.trainable if not np.array_equal(before[t.name], after[t.name])}
    assert changed == {2, 3, -1}
    assert report.mean_active_layers == 4


def test_what_is_wrong_is_said_before_a_step_is_taken(word_artifact, word_file, tmp_path):
    def refused(error, message, **changes):
        options = {**OPTIONS, "data": word_file, "out": tmp_path / "run", "on_step": killer(0), **changes}
        with pytest.raises(error, match=message):
            train(
                changes.pop("artifact_dir", word_artifact),
                **{k: v for k, v in options.items() if k != "artifact_dir"},
            )

    (tmp_path / "file").write_text("")
    refused(ConfigError, "cannot be the output folder", out=tmp_path / "file")
    refused(DataError, r"absent\.csv: cannot be read", eval=tmp_path / "absent.csv")
    refused(ArtifactError, "no PEFT adapter here", adapter=tmp_path)
    refused(ConfigError, "no policy 'half'", policy="half")
    refused(ConfigError, "lr must be above 0, got -1.0; seed must be at least 0", lr=-1.0, seed=-1)
    refused(ConfigError, "rules: unknown key 'wind'", rules={"wind": 1})
    refused(ConfigError, "checkpoint_every must be at least 0, got -1", checkpoint_every=-1)
    refused(ArtifactError, "no artifact here", artifact_dir=tmp_path)
    shutil.copytree(word_artifact, tmp_path / "cut")
    (tmp_path / "cut" / "base.safetensors").write_bytes(b"")
    refused(ArtifactError, "truncated", artifact_dir=tmp_path / "cut")


def test_texts_that_are_cut_are_told_once_for_each_file(word_artifact, tmp_path):
    (tmp_path / "long.csv").write_text(f"text,label\n{'red ' * 30},a\ndog,b\n")
    (tmp_path / "short.csv").write_text("text,label\ndog,b\n")
    notes = []
    run = {
        "artifact": word_artifact,
        "out": tmp_path / "run",
        "steps": 1,
        "on_note": notes.append,
        "threads": 1,
    }
    train(data=tmp_path / "long.csv", eval=tmp_path / "short.csv", seq_len=8, **run)
    told, measuring, _ = map(str, notes)
    assert measuring == "measuring on 1 held-out samples"
    assert "long.csv: 1 of 2 samples are longer than 8 tokens (the model takes up to 32)" in told


def test_a_damaged_checkpoint_is_named_with_the_way_out(word_artifact, word_file, tmp_path):
    run = {"artifact": word_artifact, "data": word_file, "out": tmp_path / "run", "steps": 3, **OPTIONS}
    with pytest.raises(Killed):
        train(checkpoint_every=1, on_step=killer(1), **run)
    path = tmp_path / "run" / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        StateError, match=r"checkpoint\.safetensors: a damaged checkpoint: .*delete it to start anew"
    ):
        train(**run)


HEADED = {**OPTIONS, "steps": 6, "head_start": "class-mean"}


def test_a_head_of_class_means_answers_before_anything_is_trained(word_artifact, word_file, tmp_path):
    """One step at a rate of nearly nothing."""
    options = {**OPTIONS, "lr": 1e-12, "steps": 1, "eval": word_file}
    plain = train(word_artifact, data=word_file, out=tmp_path / "plain", **options)
    notes = []
    out = tmp_path / "run"
    headed = train(
        word_artifact, data=word_file, out=out, head_start="class-mean", on_note=notes.append, **options
    )
    assert plain.accuracy < 0.6
    assert headed.accuracy > 0.9
    assert headed.loss_first < plain.loss_first / 2
    assert "head.weight: class means of 120 samples" in notes
    assert json.loads((out / "run.json").read_text())["arguments"]["head_start"] == "class-mean"


def test_a_killed_run_with_a_head_of_class_means_goes_on_to_the_bit(word_artifact, word_file, tmp_path):
    options = {**HEADED, "data": word_file, "checkpoint_every": 1, "proximal": 0.1}
    train(word_artifact, out=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        train(word_artifact, out=tmp_path / "run", on_step=killer(3), **options)
    notes = []
    train(word_artifact, out=tmp_path / "run", on_note=notes.append, **options)
    assert not [note for note in notes if "class means" in str(note)], "they are in the checkpoint"
    assert same(adapter_of(tmp_path / "run", word_artifact), adapter_of(tmp_path / "whole", word_artifact))


def test_a_run_does_not_go_on_with_another_head_start(word_artifact, word_file, tmp_path):
    options = {**HEADED, "data": word_file, "out": tmp_path / "run"}
    train(word_artifact, **options)
    with pytest.raises(ConfigError, match="head_start: class-mean there, none here"):
        train(word_artifact, **{**options, "head_start": "none", "steps": 8})
    assert train(word_artifact, **{**options, "steps": 8}).steps == 8


def test_an_unknown_head_start_is_refused(word_artifact, word_file, tmp_path):
    with pytest.raises(UnknownName, match="no head_start 'zeros'; have: class-mean, none"):
        train(word_artifact, data=word_file, out=tmp_path / "run", **{**HEADED, "head_start": "zeros"})


def test_work_that_learns_no_adapter_is_refused(word_artifact, word_file, tmp_path):
    work = LocalWork(learns="class-means")
    with pytest.raises(ConfigError, match="work that learns class-means takes no steps"):
        training.train(word_artifact, data=word_file, out=tmp_path / "run", work=work)
