"""The whole product on one machine: export, MQTT server, aggregator, device processes, evaluation."""

import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fleetune.broker.jobs.settings import Job
from fleetune.broker.jobs.work import as_chosen
from fleetune.broker.laws import TABLES
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.errors import ConfigError, FleetuneError
from fleetune.device_runtime.options import check
from fleetune.toolkit.corpora import read_corpus
from fleetune.toolkit.live import size
from fleetune.toolkit.processes import Fleet, fleet
from fleetune.toolkit.utterances import Corpus, make_corpus, write_lines

if TYPE_CHECKING:
    from fleetune.broker.service.result import AggregateReport

JOB = "demo"
MARK = "demo.json"
_WATCH_EVERY_S = 0.5
_LEAVE_WITHIN_S = 60.0
_ORPHANED_AFTER_S = 300
"""A device whose demo was killed outright gives up then."""
_OURS = ("data", "artifact", "devices", "run")

HOUSEHOLD_WORK = LocalWork(batch_size=16, seq_len=64, codec="fp16", optimizer=OptimizerSpec(lr=5e-3))
"""Fits the household utterances and two cores."""

Event = Callable[[Any], None]


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo came to; bytes as the aggregator counts them, memory of the largest training device."""

    rounds: int
    accuracy_before: float
    accuracy: float
    loss: float
    bytes_down: int
    bytes_up: int
    mean_active_layers: float
    device_peak_rss_mb: float
    wall_s: float
    adapter: str


def demo(
    *,
    data: Path | None = None,
    rounds: int = 6,
    devices: int = 4,
    out: Path | str = "demo-run",
    seed: int = 0,
    columns: Columns = Columns(),
    work: LocalWork = HOUSEHOLD_WORK,
    on_event: Event | None = None,
) -> DemoReport:
    """Fine-tune the packaged MiniLM with ``devices`` processes over a real MQTT server on this machine.

    Args:
        data: labelled JSON lines or CSV; without it the utterances of a made-up household.
        rounds: federated rounds.
        devices: training processes; one more evaluates.
        out: folder to write; an earlier demo there is replaced, anything else is refused.
        seed: of data, split and training.
        columns: where the lines of ``data`` have the text and the label.
        work: what a device does in a round.
        on_event: called with lines of text, and with each round's row.

    Raises:
        FleetuneError: whatever went wrong; every process has ended by then.
    """
    say = on_event or (lambda event: None)
    job, work = as_chosen(Job(JOB, rounds=rounds, clients=devices, seed=seed), work)
    check(job, work, tables=TABLES)
    if columns != Columns() and data is None:
        raise ConfigError("--text-column and --label-column are of a file: give --data too")
    started, out = time.monotonic(), _fresh(Path(out))
    corpus = (
        read_corpus(data, num_devices=devices, seed=seed, columns=columns)
        if data
        else make_corpus(seed, num_speakers=devices)
    )
    labels = _write(corpus, out / "data", say)
    artifact = _export(out / "artifact", labels, seed, say)

    from fleetune.broker.aggregation import aggregate
    from fleetune.broker.servers.embedded import EmbeddedServer

    with EmbeddedServer() as server, fleet() as members:
        say(f"MQTT server at {server.url}; {devices} training devices and one that evaluates, a process each")
        for name in (*corpus.train, "evaluator"):
            _start(members, out, name, artifact, server.url)
        report = _aggregate(
            members,
            partial(
                aggregate,
                artifact,
                mqtt=server.url,
                job=job,
                out=out / "run",
                work=work,
                on_round=say,
                on_note=say,
            ),
        )
        members.wait(_LEAVE_WITHIN_S)
    result = _report(report, members, time.monotonic() - started)
    (out / MARK).write_bytes(msgspec.json.encode(result))
    return result


def _fresh(out: Path) -> Path:
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise ConfigError(f"{out} is not empty and was not made by a demo; give another --out")
    for name in _OURS:
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("{}\n", encoding="utf-8")
    return out


def _write(corpus: Corpus, folder: Path, say: Event) -> list[str]:
    folder.mkdir(parents=True)
    for name, lines in corpus.train.items():
        write_lines(folder / f"{name}.jsonl", lines)
    write_lines(folder / "evaluator.jsonl", corpus.test)
    labels = sorted({line.label for lines in (*corpus.train.values(), corpus.test) for line in lines})
    sizes = ", ".join(f"{len(lines)} of {name}" for name, lines in corpus.train.items())
    say(f"{len(labels)} labels; training lines: {sizes}; {len(corpus.test)} test lines of nobody among them")
    return labels


def _export(folder: Path, labels: list[str], seed: int, say: Event) -> Path:
    from fleetune.toolkit.export import export
    from fleetune.toolkit.models import packaged_model

    say("exporting all-MiniLM-L6-v2 with LoRA (the only step that needs torch)")
    report = export(
        packaged_model(), task="sequence-classification", out=folder, labels=labels, seed=seed, on_note=say
    )
    sizes = f"{size(report.base_bytes)} frozen, {size(report.adapter_bytes)} trained"
    say(f"artifact: {report.num_layers} layers, {sizes}")
    return folder


def _start(members: Fleet, out: Path, name: str, artifact: Path, url: str) -> None:
    folder = out / "devices" / name
    role = "evaluate" if name == "evaluator" else "train"
    options = {
        "--data": out / "data" / f"{name}.jsonl",
        "--mqtt": url,
        "--job": JOB,
        "--id": name,
        "--state": folder,
    }
    options |= {"--role": role, "--threads": 1, "--idle-limit-s": _ORPHANED_AFTER_S}
    members.start(
        name, folder, [str(artifact), "--json", *(str(part) for pair in options.items() for part in pair)]
    )


def _aggregate(members: Fleet, aggregate: "Callable[[], AggregateReport]") -> "AggregateReport":
    """Run the aggregator in a thread, so that this one can watch the devices."""
    results: list[AggregateReport | FleetuneError] = []

    def run() -> None:
        try:
            results.append(aggregate())
        except FleetuneError as exc:
            results.append(exc)

    thread = threading.Thread(target=run, name="aggregator", daemon=True)
    thread.start()
    while thread.is_alive():
        members.watch()
        thread.join(_WATCH_EVERY_S)
    if not results:
        raise FleetuneError("the aggregator stopped; its traceback is above")
    result = results[0]
    if isinstance(result, FleetuneError):
        raise result
    return result


def _report(report: Any, members: Fleet, wall_s: float) -> DemoReport:
    said = [member.report() for member in members.members if member.name != "evaluator"]
    active = [words["mean_active_layers"] for words in said if words["mean_active_layers"]]
    return DemoReport(
        rounds=report.rounds,
        accuracy_before=report.history[0].accuracy,
        accuracy=report.accuracy,
        loss=report.loss,
        bytes_down=report.bytes_down,
        bytes_up=report.bytes_up,
        mean_active_layers=sum(active) / max(len(active), 1),
        device_peak_rss_mb=max(words["peak_rss_mb"] for words in said),
        wall_s=wall_s,
        adapter=str(report.adapter),
    )
