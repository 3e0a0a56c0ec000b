"""Flower's simulation: devices that add a number to an adapter, merged by FedAvg; prints one JSON object.

Runs in Flower's environment. Usage: flower_rounds.py MB COUNT ROUNDS. The first round, in which Ray starts, is in none of the
figures but ``first_s``. CPU seconds are those of the process that merges and hands out, all its threads, not of Ray's own or of
the devices'; ``servers_cpu_s`` has Ray's own besides (gcs, raylet with its store, agents), all but the workers that are devices.
"""

import contextlib
import json
import os
import resource
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import flwr
import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client, server = ClientApp(), ServerApp()
marks: list[tuple[float, float]] = []
rays: list[float] = []
"""Processor time of Ray's own processes at the end of the first round and of the last."""


@client.train()
def _train(message, context):
    arrays = [array + np.float32(1e-3) for array in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 10, "loss": 1.0})}
    )
    return flwr.app.Message(content=content, reply_to=message)


class Marked(FedAvg):
    """FedAvg that takes the time when a round is merged."""

    def aggregate_train(self, server_round, replies):
        """Merge."""
        found = super().aggregate_train(server_round, replies)
        marks.append((time.perf_counter(), time.process_time()))
        if server_round in (1, int(sys.argv[3]) + 1):
            rays.append(_rays_cpu_s())
            if server_round == 1:
                marks[-1] = (time.perf_counter(), time.process_time())  # to look has taken some
        return found


def _rays_cpu_s() -> float:
    """Processor time so far of all that this process has started and that is no device, nanoseconds added up."""
    parents, spent = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[folder.name] = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            command = (
                (folder / "cmdline").read_bytes().split(b"\0")[:3]
            )  # the raylet's names workers further on
            is_worker = command[0].startswith((b"ray::ClientAppActor", b"ray::IDLE"))
            is_worker |= any(word.endswith(b"default_worker.py") for word in command)
            tasks = [] if is_worker else [*(folder / "task").iterdir()]
            spent[folder.name] = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
    own = str(os.getpid())

    def is_ours(process: str) -> bool:
        while (process := parents.get(process, "")) not in ("", own):
            pass
        return process == own

    return sum(spent[process] for process in spent if is_ours(process)) / 1e9


@server.main()
def _serve(grid, context) -> None:
    size_mb, count, rounds = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    strategy = Marked(
        fraction_evaluate=0.0,
        min_train_nodes=count,
        min_available_nodes=count,
        min_evaluate_nodes=0,
    )
    start = ArrayRecord([np.zeros((8, max(1, int(size_mb * 1e6 / 32))), np.float32)])
    marks.append((time.perf_counter(), time.process_time()))
    strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds + 1)


def main() -> None:
    """Run, and print what a round took."""
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=int(sys.argv[2]), backend_config=resources)
    took = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(marks)]
    figures = {
        "wall_s": statistics.median(wall_s for wall_s, _ in took[1:]),
        "cpu_s": statistics.median(cpu_s for _, cpu_s in took[1:]),
        "servers_cpu_s": (marks[-1][1] - marks[1][1] + rays[1] - rays[0]) / (len(took) - 1),
        "first_s": took[0][0],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "version": flwr.__version__,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
