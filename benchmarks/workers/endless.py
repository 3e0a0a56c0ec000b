"""One fresh process with an aggregator, three devices and an evaluating one on disk, under a pretended clock, for many rounds.

Usage: endless.py ROUNDS FOLDER AT..., rounds at which figures are taken. Prints one JSON object.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.workers.many_agents import ADAPTER, ARTIFACT, JOB, Aggregator, Training
from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.files import DiskFiles
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.turns import Turns
from fleetune.device_runtime.terms.contract import Contract
from fleetune.device_runtime.terms.terms import Terms

SPAN = 100
"""Rounds before a figure that its processor time is the mean of."""


class Measured(NamedTuple):
    """An evaluation that took no time."""

    loss: float = 1.0
    accuracy: float = 0.5
    num_samples: int = 10


def agent_of(name: str, role: str, server: Loopback, folder: Path) -> tuple[object, Agent]:
    """Make an agent that keeps everything in a folder, its owner's record too."""
    identity = Identity(name, JOB, ARTIFACT, role)
    link = server.connect(identity.topics, will=identity.will)
    files, terms = (
        DiskFiles(folder / name),
        Terms(
            least_samples=0,
            least_effective=0,
            least_batch=0,
            least_of_a_class=0,
            most_rounds_a_day=0,
            most_bytes_a_day=0,
        ),
    )
    outbox = OutboxFile(folder / name / "outbox.sqlite")
    home = Home(
        link, outbox, files, identity, FirstAdapter.of(ADAPTER), checkpoint_every=0,
        contract=Contract(terms, facts=outbox, files=files),
    )  # fmt: skip
    return link, Agent(home, Workbench(Training, lambda work, adapter: Measured(), num_samples=10))


def disk_mb(folder: Path) -> float:
    """What lies in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def run(rounds: int, folder: Path, at: list[int]) -> list[dict[str, float]]:
    """Run a job, and return its figures at some rounds."""
    settings = Settings(
        job=JOB, artifact=ARTIFACT, rounds=rounds, clients=3, min_clients=3, work=LocalWork(steps=1)
    )
    server, turns = Loopback(), None
    turns = Turns(server)
    link, spent, found = server.connect(topics(JOB), will=will(JOB, "session")), {0: time.process_time()}, []

    def on_row(row):
        spent[row.round] = time.process_time()
        spent.pop(row.round - SPAN - 1, None)
        if row.round in at:
            found.append(figures(row.round))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)

    def figures(number: int) -> dict[str, float]:
        status = Path("/proc/self/status").read_text()
        return {
            "round": number,
            "round_cpu_ms": round(1e3 * (spent[number] - spent[number - SPAN]) / SPAN, 2),
            "resident_mb": round(int(status.partition("VmRSS:")[2].split()[0]) / 1024, 1),
            "open_files": len(os.listdir("/proc/self/fd")) - 1,
            "version_files": len(list((folder / "run" / "versions").iterdir())),
            "run_mb": round(disk_mb(folder / "run"), 2),
            "ledger_mb": round(sum(p.stat().st_size for p in (folder / "run").glob("ledger*")) / 1e6, 2),
            "device_mb": round(disk_mb(folder / "device-0"), 2),
        }

    (folder / "run").mkdir(parents=True, exist_ok=True)
    with Ledger(folder / "run", settings) as ledger:
        service = Service(
            link, ledger, settings, patience=Patience(), adapter=ADAPTER, session="session", now=turns.now, on_row=on_row
        )  # fmt: skip
        turns.join(link, Aggregator(link, service))
        for name in ("device-0", "device-1", "device-2"):
            turns.join(*agent_of(name, "train", server, folder))
        turns.join(*agent_of("judge", "evaluate", server, folder))
        turns.run(until=lambda: service.finished)
    return found


def main() -> None:
    """Run, and print what it took."""
    print(json.dumps({"rows": run(int(sys.argv[1]), Path(sys.argv[2]), [int(n) for n in sys.argv[3:]])}))


if __name__ == "__main__":
    main()
