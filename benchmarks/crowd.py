"""Rounds of many devices over a real Mosquitto: what they cost the server, what is dropped, and whether a restart changes a bit.

Devices are real agents and links that train nothing and send whole fp32 updates; the aggregator keeps its ledger on disk. A
case is devices x MB of an adapter, as ``3000x0.3``; with ``-restart`` Mosquitto is killed and started again once a third of the
hellos are in, and with ``-calm`` the same goes undisturbed. ``-without8``: a process with the last 8 is killed when the first of
them sends its update; the adapter is to have the bits of a run that never had them. ``-silent8``: it is stopped instead, and
so leaves no will. ``-timed``: each upload is timed, and downloads as devices tell them.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.mosquitto import Server, mosquitto_server
from benchmarks.measuring.processes import FOLDER
from fleetune.device_runtime.errors import ConfigError

CASES = ("3000x0.3", "300x3", "3000x0.01-calm", "3000x0.01-restart")
ROUNDS, ROUNDS_OF_MANY, MANY = 3, 1, 1000
"""Rounds measured, and where there are many devices."""
A_PROCESS = 250
"""Devices in a process at most: each has a thread, and three descriptors of the 1,024 that it may wait for. There are as many
processes as processors at least: on machines of their own devices do not wait for each other, behind one interpreter they do."""
_CASE = re.compile(
    r"(?P<count>[1-9]\d*)x(?P<mb>\d+(\.\d+)?)(-(?P<way>restart|calm|timed|(without|silent)(?P<lost>[1-9]\d*)))?"
)
Say = Callable[[str], None]


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = 1) -> dict[str, Any]:
    """One row per case and repeat.

    Args:
        say: told each run.
        only: cases in the place of :data:`CASES`.
        repeats: how often each is run.
    """
    rows = []
    for _ in range(repeats):
        for case in only or CASES:
            rows.append({"": case, **run_case(case)})
            say(f"{case}: {rows[-1]}")
    for line in table(rows):
        say(line)
    return {"benchmark": "crowd", "repeats": repeats, "rows": rows}


def run_case(case: str, *, rounds: int = 0) -> dict[str, Any]:
    """Run one job with its own server and device processes, and return what its aggregator measured.

    ``…cpu_ms`` is per device and round; Mosquitto's is over the whole job. ``servers_cpu_s`` is the mean of a
    counted round, aggregator and Mosquitto together. ``rounds``: 0 for as many as the file says.

    Raises:
        ConfigError: a case that is none, or an aggregator that failed.
    """
    count, size_mb, way, num_lost = parsed(case)
    rounds = rounds or (ROUNDS_OF_MANY if count >= MANY else ROUNDS)
    living = count - num_lost
    with tempfile.TemporaryDirectory() as name, mosquitto_server(Path(name) / "server") as server:
        with (
            _crowd(server.url, size_mb, range(living)),
            _crowd(server.url, size_mb, range(living, count)) as doomed,
            _aggregator(
                server.url,
                size_mb,
                count,
                rounds,
                Path(name) / "job",
                living,
                *(["timed"] if way == "timed" else []),
            ) as process,
        ):
            end = signal.SIGSTOP if way.startswith("silent") else signal.SIGKILL
            found = _run(process, server, doomed, end=end, is_restarted=way == "restart")
        job = (rounds + 1) * count
        return {
            "wall_s": round(found["wall_s"], 3),
            "cpu_s": round(found["cpu_s"], 3),
            "cpu_ms": round(1e3 * found["cpu_s"] / count, 2),
            "mosquitto_cpu_ms": round(1e3 * server.cpu_s / job, 2),
            "servers_cpu_s": round(found["mean_cpu_s"] + found["mosquitto_cpu_s"], 3),
            **{name: found[name] for name in ("sent_mb", "messages_sent", "messages_received", "dropped")},
            **{name: found[name] for name in ("first_s", "peak_mb", "connections", "digest")},
            **{
                name: found[name]
                for name in ("closed_after_s", "upload_s", "slowest_upload", "download_s")
                if name in found
            },
        }


def parsed(case: str) -> tuple[int, float, str, int]:
    """Devices, MB of an adapter, what happens on the way, and how many of the devices are lost.

    Raises:
        ConfigError: it is none, or loses all of its devices.
    """
    found = _CASE.fullmatch(case)
    count, num_lost = (int(found["count"]), int(found["lost"] or 0)) if found else (0, 0)
    if not found or num_lost >= count:
        raise ConfigError(
            f"--only {case}: expected DEVICESxMB, as 3000x0.3, and after it -restart, -calm, -timed, "
            "-without8 or -silent8 (fewer than there are) or nothing"
        )
    return count, float(found["mb"]), found["way"] or "", num_lost


def _run(
    process: "subprocess.Popen[str]",
    server: Server,
    doomed: Sequence["subprocess.Popen[str]"],
    *,
    end: signal.Signals,
    is_restarted: bool,
) -> dict[str, Any]:
    """Read what an aggregator says to its end; kill its server when it has heard a third, ``end`` the doomed when they send."""
    last, spent = "", []
    for line in process.stdout or ():
        if line.strip() == "hellos":
            if is_restarted:
                server.kill()
                server.start()
        elif line.strip() == "doomed":
            for one in doomed:
                one.send_signal(end)
        elif line.strip() == "round":
            spent.append(server.cpu_s)
        else:
            last = line
    if process.wait():
        raise ConfigError(f"the aggregator failed: {_said(process)}")
    return {**json.loads(last), "mosquitto_cpu_s": (spent[-1] - spent[0]) / (len(spent) - 1)}


@contextlib.contextmanager
def _aggregator(*words: object) -> Iterator["subprocess.Popen[str]"]:
    with _worker("crowd", *words) as process:
        yield process


@contextlib.contextmanager
def _crowd(url: str, size_mb: float, numbers: range) -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes with the devices, all of them connected; ended when the block is left."""
    num_processes = max(-(-len(numbers) // A_PROCESS), min(len(numbers), os.cpu_count() or 1))
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                _worker("crowd_devices", url, size_mb, numbers.start + k, numbers.stop, num_processes)
            )
            for k in range(num_processes)
        ]
        for process in processes:
            if not (process.stdout and process.stdout.readline()):
                raise ConfigError(f"devices do not connect: {_said(process)}")
        yield processes


@contextlib.contextmanager
def _worker(name: str, *words: object) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, str(FOLDER / "workers" / f"{name}.py"), *map(str, words)]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **limits, "PYTHONPATH": str(FOLDER.parent)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        process.stderr = errors  # type: ignore[assignment]
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _said(process: "subprocess.Popen[str]") -> str:
    """The last of what a process said on its standard error."""
    if process.stderr is None:
        return "no word"
    process.stderr.seek(0)
    return process.stderr.read()[-2000:]
