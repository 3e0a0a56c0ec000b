import inspect
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import children
import msgspec
import pytest
from paths import ROOT
from rich.console import Console
from typer.testing import CliRunner

from fleetune.broker.laws import TABLES
from fleetune.device_runtime.commands.train import TrainReport
from fleetune.device_runtime.contracts.scores import LABELS
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.policies import POLICIES
from fleetune.toolkit.cli import COMMANDS, app
from fleetune.toolkit.commands import federation, running, workstation
from fleetune.toolkit.commands.options import (
    AGGREGATE,
    DEMO,
    DEVICE,
    GENERATE,
    PREDICT,
    TRAIN,
    WATCH,
)
from fleetune.toolkit.flags import claimed

HOMES = {
    "export": "fleetune.toolkit.export",
    "inspect": "fleetune.device_runtime.commands.inspect",
    "selfcheck": "fleetune.device_runtime.commands.selfcheck",
    "sign": "fleetune.device_runtime.commands.sign",
    "train": "fleetune.device_runtime.commands.train",
    "predict": "fleetune.device_runtime.commands.predict",
    "generate": "fleetune.device_runtime.commands.generate",
    "device": "fleetune.device_runtime.commands.device",
    "aggregate": "fleetune.broker.aggregation",
    "broker": "fleetune.broker.servers.embedded",
    "enrol": "fleetune.device_runtime.commands.enrol",
    "web": "fleetune.toolkit.web",
    "merge": "fleetune.toolkit.merge",
    "demo": "fleetune.toolkit.demo",
    "bench": "fleetune.toolkit.benchmark",
    "compare": "fleetune.toolkit.simulation.compare",
    "plot": "fleetune.toolkit.plot",
    "simulate": "fleetune.toolkit.simulation.simulate",
    "status": "fleetune.toolkit.watching.status",
    "watch": "fleetune.toolkit.watching.watch",
    "doctor": "fleetune.device_runtime.commands.doctor",
    "init": "fleetune.toolkit.initial",
}
AROUND = {"config", "json", "verbose", "explain", "log_to", "log_json"}
PARTS = {
    "train": TRAIN,
    "predict": PREDICT,
    "generate": GENERATE,
    "device": DEVICE,
    "aggregate": AGGREGATE,
    "demo": DEMO,
}
PARTS |= {"status": WATCH, "watch": WATCH, "doctor": DEVICE}
ONE_FUNCTION = [command for command in COMMANDS if command.__name__ != "broker"]


def fleetune(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def function_of(name):
    return getattr(import_module(HOMES[name]), "serve" if name == "broker" else name)


@pytest.fixture
def stand_in(monkeypatch):
    """Replace what a command calls by a function; returns what it was called with."""

    def replace(function):
        monkeypatch.setattr(
            running, "import_module", lambda name: SimpleNamespace(**{function.__name__: function})
        )

    return replace


@pytest.mark.parametrize("command", ONE_FUNCTION, ids=lambda c: c.__name__)
def test_every_option_is_a_parameter_of_the_function_or_a_field_of_one(command):
    parts = PARTS.get(command.__name__, {})
    options = list(inspect.signature(command).parameters)
    parameters = list(inspect.signature(function_of(command.__name__)).parameters)
    positional = 0 if command.__name__ in ("demo", "status", "watch") else 1
    given = {*options[positional:], *parts} - claimed(parts).keys() - AROUND
    assert given <= set(parameters[positional:])
    assert not set(parameters) & claimed(parts).keys() - parts.keys(), "a flag is one thing only"


@pytest.mark.parametrize("command", PARTS)
def test_the_structs_a_command_starts_from_are_the_functions_own_defaults(command):
    parameters = inspect.signature(function_of(command)).parameters
    for name, part in PARTS[command].items():
        wanted = inspect.Parameter.empty if isinstance(part.source, type) else part.source
        assert parameters[name].default == wanted


def test_no_function_of_the_public_door_is_a_list_of_hyper_parameters():
    for name in ("train", "device", "aggregate", "demo"):
        own = inspect.signature(function_of(name)).parameters.keys() - PARTS[name].keys()
        assert len(own) <= 12, name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_the_defaults_that_help_shows_are_the_functions_own(command):
    parameters = inspect.signature(function_of(command.__name__)).parameters
    for name, option in inspect.signature(command, eval_str=True).parameters.items():
        text = getattr(option.annotation.__metadata__[0], "help", "") or ""
        shown = text.partition("[default: ")[2].rstrip("]")
        default = parameters[name].default if name in parameters else None
        if shown and default not in (None, inspect.Parameter.empty) and " " not in shown:
            assert shown == str(default), name


def test_help_and_version():
    assert fleetune("--help").exit_code == 0
    version = fleetune("--version")
    assert (version.exit_code, version.stdout.split()[0]) == (0, "fleetune")


def test_usage_mistakes_end_with_2(tmp_path):
    for words, begin, end in (
        (("nonsense",), "no such command 'nonsense'", ""),
        (("--bogus", "train"), "no such option: --bogus", ""),
        (("train",), "train: missing argument 'DIR'", " train"),
        (("train", tmp_path), "train: needs --data and --out", " train"),
        (("train", "x", "y"), "train: got unexpected extra argument", " train"),
        (("train", "x", "--lr"), "train: option '--lr' requires an argument", " train"),
        (("train", "x", "--lr", "fast"), "train: invalid value for '--lr': ", " train"),
        (("export", "m", "--tusk", "z"), "export: no such option: --tusk", " export"),
    ):
        wrong = fleetune(*words)
        assert (wrong.exit_code, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
        assert wrong.stderr.startswith(f"fleetune: {begin}")
        assert wrong.stderr.endswith(f"; see fleetune{end} --help\n")


def test_fleetune_alone_is_asked_for_its_help():
    alone = fleetune()
    assert alone.exit_code == 2
    assert "Commands:" in alone.output


def test_our_errors_are_one_line_and_1(tmp_path):
    failed = fleetune("inspect", tmp_path)
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith(f"fleetune: {tmp_path}: no artifact here")
    assert failed.stderr.count("\n") == 1


def test_an_unknown_key_in_a_file_is_one_line(tmp_path):
    (tmp_path / "c.toml").write_text("[train]\nlearning_rate = 1\n")
    failed = fleetune("train", tmp_path, "--config", tmp_path / "c.toml")
    assert failed.exit_code == 1
    assert "unknown key 'learning_rate'; have: " in failed.stderr


def test_help_names_every_policy_there_is():
    shown = fleetune("train", "--help").stdout
    assert [name for name in POLICIES if name not in shown] == []


def test_every_hyper_parameter_has_a_help_and_its_table_is_there():
    for parts in PARTS.values():
        for name, (_, flag) in claimed(parts).items():
            assert flag.option.help, name
            assert not flag.option.table or flag.option.table in TABLES, name


@pytest.mark.parametrize("command", ONE_FUNCTION, ids=lambda c: c.__name__)
def test_help_marks_what_a_command_cannot_do_without(command):
    """The function's own parameters without a default, and the fields of its structs."""
    parameters = inspect.signature(function_of(command.__name__)).parameters
    flags = claimed(PARTS.get(command.__name__, {}))
    needed = {
        name
        for name, p in parameters.items()
        if p.default is p.empty and name not in PARTS.get(command.__name__, {})
    }
    needed |= {name for name, (_, flag) in flags.items() if flag.default is msgspec.NODEFAULT}
    marked = set()
    for name, option in inspect.signature(command, eval_str=True).parameters.items():
        if "[required]" in (option.annotation.__metadata__[0].help or ""):
            marked.add(name)
    arguments = {n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert marked == needed - arguments


def test_help_stands_under_headings_and_takes_the_terminal_it_has():
    words = {**os.environ, "COLUMNS": "140", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, "-m", "fleetune", "train", "--help"],
        capture_output=True,
        text=True,
        env=words,
        check=True,
    ).stdout
    lines = shown.splitlines()
    headings = [line for line in lines if line.endswith(":") and line[0] != " "]
    assert headings == ["Arguments:", "Options:", "Data:", "Training:", "Machine:"]
    assert 100 < max(map(len, lines)) <= 140
    options = shown[shown.index("Options:") : shown.index("Training:")]
    assert "--data PATH" in options
    assert "[required]" in options
    assert "--lr" not in options


def test_the_usage_is_what_one_types():
    assert fleetune("train", "--help").stdout.startswith("Usage: fleetune train [OPTIONS] DIR\n")


def test_a_shell_can_complete_it():
    assert "--install-completion" in fleetune("--help").stdout


PROMISED = """
    train: data eval policy drop depth-shape period schedule horizon protected protect gates width first
        batch-size seq-len steps epochs lr optimizer weight-decay warmup-steps decay clip-norm seed
        threads cores provider recompute save stream resident memory-budget-mb checkpoint-every resume
        no-resume adapter rules out config json
    device: data mqtt job id state role threads cores provider recompute stream memory-budget-mb ca-file checkpoint-every
        timeout-s idle-limit-s rules config json
    aggregate: mqtt job rounds clients out strategy codec policy drop depth-shape period batch-size seq-len local-steps
        local-epochs lr optimizer weight-decay warmup-steps decay clip-norm min-clients deadline-s gather-s evaluate-every
        evaluation-s extensions-max seed ca-file timeout-s config json
    demo: data rounds devices out seed policy drop period codec json
    broker: port host configure
"""


def test_promised_flags_keep_their_names():
    """Scripts rely on them (design.md, "Command line")."""
    for line in PROMISED.replace("\n        ", " ").strip().splitlines():
        command, _, flags = line.strip().partition(": ")
        words = fleetune(command, "--help").stdout.replace(",", " ").split()
        assert {f"--{flag}" for flag in flags.split()} <= set(words), command


def test_flags_of_mosquitto_need_configure(tmp_path):
    refused = fleetune("broker", "--password-file", tmp_path / "p")
    assert (refused.exit_code, refused.stderr) == (
        2,
        "fleetune: broker: --password-file needs --configure; see fleetune broker --help\n",
    )
    refused = fleetune("broker", "--configure", tmp_path / "m", "--client-ca", tmp_path / "ca")
    assert (refused.exit_code, refused.stderr) == (
        2,
        "fleetune: broker: TLS needs --certificate and --key; see fleetune broker --help\n",
    )
    missing = fleetune("broker", "--configure", tmp_path / "m", "--password-file", tmp_path / "p")
    assert missing.exit_code == 1
    assert "p: no such file" in missing.stderr
    assert not (tmp_path / "m").exists()


def test_mosquittos_configuration_is_written(tmp_path):
    for name in ("passwords", "server.crt", "server.key", "ca.crt"):
        (tmp_path / name).write_text("")
    words = ["--configure", tmp_path / "m", "--port", 8883, "--password-file", tmp_path / "passwords"]
    words += ["--certificate", tmp_path / "server.crt", "--key", tmp_path / "server.key"]
    words += ["--client-ca", tmp_path / "ca.crt", "--websockets-port", 443, "--no-persistence"]
    done = fleetune("broker", *words, "--aggregator", "operator")
    assert done.exit_code == 0, done.stderr
    assert f"mosquitto -c {tmp_path / 'm' / 'mosquitto.conf'}" in done.stdout
    written = (tmp_path / "m" / "mosquitto.conf").read_text()
    for line in (
        "listener 8883",
        "listener 443",
        f"password_file {tmp_path / 'passwords'}",
        f"certfile {tmp_path / 'server.crt'}",
        "require_certificate true",
    ):
        assert line in written.splitlines()
    assert "persistence true" not in written
    assert "user operator" in (tmp_path / "m" / "fleetune.acl").read_text()


def test_several_texts_are_answered_in_their_order(stand_in):
    def predict(artifact_dir, *, text: Any = None, on_note: Any = None, **rest: Any) -> list[Any]:
        on_note("a remark")
        return [SimpleNamespace(score=0.5, label=word, text=word) for word in text]

    stand_in(predict)
    done = fleetune("predict", "x", "--text", "b", "--text", "a")
    assert done.stdout == "0.500  b  b\n0.500  a  a\n"
    assert done.stderr == "a remark\n"


def test_the_end_of_a_run_is_for_people(stand_in):
    report = TrainReport(
        steps=100,
        step_ms_median=66.4,
        peak_rss_mb=482.625,
        loss_first=4.34,
        loss_last=2.68,
        accuracy=0.372,
        eval_loss=2.71,
        mean_active_layers=6.0,
        num_samples=1600,
        memory_plan={"micro_batch": 0},
        losses=[1.0],
        pauses=2,
        paused_s=61.0,
        adapter="run/adapter",
    )

    def train(artifact_dir, *, data: str, out: str, on_step: Any, on_note: Any, **rest: Any) -> TrainReport:
        return report

    stand_in(train)
    words = ("train", "x", "--data", "d", "--out", "o")
    assert fleetune(*words).stdout.splitlines() == [
        "accuracy 0.372 on held-out data (loss 2.7100)",
        "100 steps on 1600 samples, loss 4.3400 -> 2.6800",
        "66 ms a step, 506.1 MB at most, 6.0 layers active",
        "paused 2 times by the rules, 61 s in all",
        "adapter: run/adapter",
    ]
    assert json.loads(fleetune(*words, "--json").stdout) == msgspec.to_builtins(report)


def test_the_end_of_an_export_of_a_device_and_of_a_federation_is_for_people(capsys):
    console = Console(width=200)
    sizes = {"base_bytes": 90_900_000, "adapter_bytes": 417_000, "graph_bytes": 83_300}
    exported = {"out": "a", "architecture": "Bert", "task": "causal-lm", "num_layers": 6, "num_kinds": 2}
    workstation._show_export(console, SimpleNamespace(**exported, **sizes, seconds=52.8))
    assert capsys.readouterr().out.splitlines() == [
        "a: Bert for causal-lm, 6 layers of 2 kinds",
        "90.9 MB frozen weights, 417.0 kB adapter, 83.3 kB graphs; 53 s",
        "next: fleetune selfcheck a",
    ]
    lived = {"device_id": "hall", "reason": "3 rounds are done", "refused": 0, "pauses": 2, "paused_s": 61.0}
    lived |= {"bytes_sent": 1400, "bytes_received": 1_300_000, "peak_rss_mb": 100.0, "wall_s": 21.8}
    work = {"rounds": 3, "steps": 24, "evaluations": 0, "step_ms_median": 185.2, "mean_active_layers": 6.0}
    federation._show_device(console, SimpleNamespace(**lived, **work))
    federation._show_device(console, SimpleNamespace(**lived | {"pauses": 0}, steps=0, evaluations=4))
    assert capsys.readouterr().out.splitlines() == [
        "hall: 3 rounds are done",
        "3 rounds, 24 steps, 185 ms a step, 6.0 layers active",
        "1.4 kB sent, 1.3 MB received, 104.9 MB at most, 22 s in all",
        "paused 2 times by the rules, 61 s in all",
        "hall: 3 rounds are done",
        "4 evaluations",
        "1.4 kB sent, 1.3 MB received, 104.9 MB at most, 22 s in all",
    ]
    made = {"rounds": 3, "wall_s": 18.2, "loss": 2.05, "bytes_down": 2, "bytes_up": 5}
    federation._show_aggregate(
        console, SimpleNamespace(**made, **dict.fromkeys(LABELS), adapter="fr/adapter", epsilon=None)
    )
    assert "fleetune merge fr --out DIR" in capsys.readouterr().out


def test_json_is_one_object_on_the_last_line_and_progress_is_elsewhere(stand_in):
    def train(
        artifact_dir, *, data: str, out: str, work, on_step: Any = None, on_note: Any = None, **rest: Any
    ) -> dict[str, Any]:
        on_step(SimpleNamespace(step=0, total_steps=1, loss=2.5, seconds=0.1))
        return {"steps": work.steps, "loss": float("nan")}

    stand_in(train)
    done = fleetune("train", "x", "--data", "d", "--out", "o", "--steps", 3, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {"steps": 3, "loss": None}
    assert "step 1: loss 2.5000, 100 ms" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("one\nline"), 1, "fleetune: one line\n"),
        (
            ModuleNotFoundError("", name="torch.nn"),
            1,
            "fleetune: train needs torch; run: pip install 'fleetune[export]'",
        ),
        (ModuleNotFoundError("", name="onnxruntime"), 1, "pip install 'fleetune[device]'"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "fleetune: /x/y: Permission denied\n"),
        (OSError(28, "No space left on device", "/x/run.json"), 1, "/x/run.json: No space left on device"),
        (MemoryError(), 1, "fleetune: train: not enough memory on this machine"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_goes_wrong_is_one_line(stand_in, error, code, words):
    def train(artifact_dir, *, data: str, out: str, **rest: Any) -> None:
        raise error

    stand_in(train)
    failed = fleetune("train", "x", "--data", "d", "--out", "o")
    assert failed.exit_code == code
    assert words in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ModuleNotFoundError("No module named 'fleetune.toolkit.gone'", name="fleetune.toolkit.gone"),
            "unexpected ModuleNotFoundError: No module named 'fleetune.toolkit.gone'; this is a fault of fleetune",
        ),
        (KeyError(("batch", 2)), "unexpected KeyError: ('batch', 2); this is a fault of fleetune"),
        (ValueError("two\nlines \x1b[31m"), "unexpected ValueError: two lines ?[31m; this is a fault"),
        (RuntimeError("x" * 9999), "x…; this is a fault of fleetune"),
    ],
)
def test_a_fault_of_ours_is_one_line_and_its_place_is_told_to_who_asks(stand_in, error, words):
    def train(artifact_dir, *, data: str, out: str, **rest: Any) -> None:
        raise error

    stand_in(train)
    failed = fleetune("train", "x", "--data", "d", "--out", "o")
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
    assert words in failed.stderr
    assert len(failed.stderr) < 600
    told = fleetune("train", "x", "--data", "d", "--out", "o", "--verbose")
    assert (told.exit_code, "Traceback" in told.stderr, "in train" in told.stderr) == (1, True, True)


def test_a_library_that_is_missed_later_is_named_before_anything_is_said(monkeypatch):
    monkeypatch.setattr(running, "find_spec", lambda name: None if name == "amqtt" else name)
    failed = fleetune("demo")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr == "fleetune: demo needs amqtt; run: pip install 'fleetune[demo]'\n"


def test_an_error_calls_a_command_as_its_user_did(stand_in):
    def serve(**rest: Any) -> None:
        raise ModuleNotFoundError("", name="amqtt")

    stand_in(serve)
    assert (
        fleetune("broker").stderr == "fleetune: broker needs amqtt; run: pip install 'fleetune[embedded]'\n"
    )


def test_what_takes_long_to_start_says_so_first(stand_in):
    def export(model, *, task: str, out: str, **rest: Any) -> None:
        raise ConfigError("later")

    stand_in(export)
    failed = fleetune("export", "m", "--task", "causal-lm", "--out", "o")
    assert failed.stderr == "starting torch and transformers\nfleetune: later\n"


def test_benchmarks_are_listed():
    shown = " ".join(fleetune("bench", "--help").stdout.split())
    assert "which figure: agents, backends, base-dtype, base-dtype-accuracy, budget," in shown


@pytest.mark.parametrize("on_path", [True, False])
def test_a_demo_ends_with_commands_that_this_shell_finds(monkeypatch, capsys, on_path):
    monkeypatch.setattr(federation.shutil, "which", lambda name: f"/bin/{name}" if on_path else None)
    monkeypatch.setattr(sys, "argv", [".venv/bin/fleetune", "demo"])
    numbers = {
        "accuracy_before": 0.1,
        "accuracy": 0.9,
        "mean_active_layers": 6.0,
        "device_peak_rss_mb": 100.0,
    }
    numbers |= {"bytes_down": 1, "bytes_up": 1, "rounds": 6, "wall_s": 150.0}
    federation._show_demo(Console(width=200), SimpleNamespace(adapter="demo-run/run/adapter", **numbers))
    shown, program = capsys.readouterr().out, "fleetune" if on_path else ".venv/bin/fleetune"
    assert (
        f'  {program} predict demo-run/artifact --run demo-run --text "turn the kitchen light on"\n' in shown
    )
    assert "took at most 104.9 MB" in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_cleanly(number, code):
    """The embedded server runs until it is told to stop; `finally` blocks run either way."""
    with children.start(
        [sys.executable, "-c", _WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
        text=True,
    ) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == "cleaned up\n"
    assert "Traceback" not in err


_WAITING = """
import sys, threading, types
from fleetune.toolkit.commands import federation, running
from fleetune.toolkit.commands.options import AGGREGATE, DEMO, DEVICE, TRAIN
from fleetune.toolkit.flags import claimed
def train(artifact_dir, *, data: str, out: str, **rest):
    try:
        print("waiting", flush=True)
        threading.Event().wait(60)
    finally:
        print("cleaned up", flush=True)
running.import_module = lambda name: types.SimpleNamespace(train=train)
from fleetune.toolkit.cli import main
sys.argv = ["fleetune", "train", "x", "--data", "d", "--out", "o"]
main()
"""


def test_policy_auto_is_named_where_it_belongs_and_refused_elsewhere_with_the_place(tmp_path):
    def helped(command):
        return " ".join(fleetune(command, "--help").output.replace("│", " ").split())

    assert "or auto" in helped("aggregate")
    assert "auto" in helped("demo")
    assert " auto" not in helped("train").replace("automatic", "")
    artifact = ROOT / "tests" / "data" / "tiny_artifact"
    refused = fleetune("train", artifact, "--data", "x.jsonl", "--out", tmp_path / "o", "--policy", "auto")
    assert refused.exit_code == 1
    said = "no policy 'auto' here: an aggregator chooses so for its devices (fleetune aggregate); have: "
    assert said in refused.output + refused.stderr
