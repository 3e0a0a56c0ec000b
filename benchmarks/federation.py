"""Eight devices, each with a Dirichlet(0.5) share of banking77, over a real Mosquitto; and the same federation in torch.

Set FLEETUNE_SHARED_DATA to the folder that holds ``banking77/`` if it is not ``../shared/data``.
"""

import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
from paho.mqtt.client import CallbackAPIVersion, Client

from benchmarks.measuring.mosquitto import SYS_INTERVAL_S, mosquitto
from benchmarks.measuring.processes import FOLDER, run_worker
from fleetune.broker.aggregation import aggregate
from fleetune.broker.jobs.settings import Job
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.export import export
from fleetune.toolkit.models import packaged_model
from fleetune.toolkit.processes import fleet

DEVICES, ROUNDS, STEPS, ALPHA, SEED, TEST_LINES = 8, 15, 30, 0.5, 0, 1000
WORK = LocalWork(steps=STEPS, batch_size=16, seq_len=32, optimizer=OptimizerSpec(lr=2e-3))
SETTINGS = {
    "local_steps": STEPS,
    "batch_size": WORK.batch_size,
    "seq_len": WORK.seq_len,
    "lr": WORK.optimizer.lr,
    "seed": SEED,
}
"""The same for torch, and for the summary."""
JOB = "banking"
FLEET: dict[str, Any] = {"rounds": ROUNDS, "clients": DEVICES, "seed": SEED}
CODECS = ("fp32", "int8")


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Accuracy by round and bytes, with fp32 and int8 updates and without any transport in torch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, say)
        found = {
            codec: federate(folder, codec, Job(JOB, **FLEET), msgspec.structs.replace(WORK, codec=codec), say)
            for codec in CODECS
        }
        say("the same federation in torch + peft, one process, no transport")
        settings = json.dumps({"rounds": ROUNDS, "devices": DEVICES, **SETTINGS})
        found["torch"] = run_worker("torch_federation", packaged_model(), folder, settings, threads=2)
    summary = {"devices": DEVICES, "rounds": ROUNDS, "alpha": ALPHA, **SETTINGS}
    return {
        "benchmark": "federation",
        **summary,
        **{f"{who}_{n}": v for who, f in found.items() for n, v in f.items()},
    }


def prepare(folder: Path, say: Callable[[str], None]) -> None:
    """Write what :func:`federate` takes below ``folder``."""
    export(
        packaged_model(),
        task="sequence-classification",
        labels=split(folder, find_data() / "banking77"),
        out=folder / "artifact",
        on_progress=say,
    )


def find_data() -> Path:
    """The folder of real data sets; ConfigError if there is none."""
    folder = Path(os.environ.get("FLEETUNE_SHARED_DATA", FOLDER.parent.parent / "shared" / "data"))
    if not (folder / "banking77").is_dir():
        raise ConfigError(f"{folder}: no banking77 here; set FLEETUNE_SHARED_DATA")
    return folder


def split(folder: Path, source: Path) -> list[str]:
    """Write one file of lines per device, by Dirichlet shares of each class, and a test file; returns the label names."""
    train, test = (_lines(source / f"{part}.jsonl.gz") for part in ("train", "test"))
    rng = np.random.default_rng(SEED)
    owned: list[list[dict[str, Any]]] = [[] for _ in range(DEVICES)]
    for label in sorted({line["label"] for line in train}):
        members = [line for line in train if line["label"] == label]
        owners = rng.choice(DEVICES, len(members), p=rng.dirichlet([ALPHA] * DEVICES))
        for owner, line in zip(owners, members, strict=True):
            owned[owner].append(line)
    for i, lines in enumerate(owned):
        _write(folder / f"device-{i}.jsonl", lines)
    _write(folder / "test.jsonl", [test[i] for i in rng.permutation(len(test))[:TEST_LINES]])
    return [str(name) for name in json.loads((source / "labels.json").read_text())]


def federate(
    folder: Path, name: str, job: Job, work: LocalWork, say: Callable[[str], None]
) -> dict[str, Any]:
    """Have the devices of ``folder`` do a job over a Mosquitto: accuracy, and bytes as the aggregator and as the server count.

    Args:
        folder: with ``artifact``, and the files that :func:`split` writes.
        name: of the folder below it that all of this run goes to.
        job: named ``JOB``.
        work: of each device.
        say: told of each round.
    """
    artifact, root = folder / "artifact", folder / name
    with mosquitto(root) as url, fleet() as members:
        for i in range(DEVICES):
            members.start(
                f"device-{i}",
                root / f"d{i}",
                _options(artifact, folder / f"device-{i}.jsonl", url, root / f"d{i}"),
            )
        evaluator = _options(artifact, folder / "test.jsonl", url, root / "evaluator")
        members.start("evaluator", root / "evaluator", [*evaluator, "--role", "evaluate"])
        started = time.monotonic()
        report = aggregate(
            artifact,
            mqtt=url,
            job=job,
            out=root / "run",
            work=work,
            on_round=lambda row: say(f"{name} round {row.round}: accuracy {row.accuracy}"),
        )
        members.wait(60)
        wall_s = time.monotonic() - started
        counted = counters(url)
    return {
        "accuracy": report.accuracy,
        "accuracy_by_round": [row.accuracy for row in report.history],
        "bytes_down": report.bytes_down,
        "bytes_up": report.bytes_up,
        "link_bytes": report.link_bytes_sent + report.link_bytes_received,
        "server_bytes": counted,
        "wall_s": round(wall_s, 1),
    }


def counters(url: str) -> int:
    """Payload of all messages that the server has received, in bytes, as it counts itself; 0 if it does not say within 5 s."""
    found: Queue[int] = Queue()
    client = Client(CallbackAPIVersion.VERSION2, client_id="counter")
    client.on_message = lambda _client, _data, message: found.put(int(message.payload))
    address = urlsplit(url)
    client.connect(str(address.hostname), address.port or 1883)
    time.sleep(2 * SYS_INTERVAL_S)
    client.subscribe("$SYS/broker/publish/bytes/received")
    client.loop_start()
    try:
        return found.get(timeout=5)
    except Empty:
        return 0
    finally:
        client.disconnect()
        client.loop_stop()


def _options(artifact: Path, data: Path, url: str, state: Path) -> list[str]:
    named = {
        "--data": data,
        "--mqtt": url,
        "--job": JOB,
        "--id": state.name,
        "--state": state,
        "--threads": 1,
        "--least-effective": 0,
    }
    return [str(artifact), "--json", *(str(part) for pair in named.items() for part in pair)]


def _lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
