"""Federations of real processes that are killed, cut off and started again: what comes of them is told, to be compared."""

import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from processes import Processes
from servers import Mosquitto

JOB = "campaign"


class Came(NamedTuple):
    """What a federation came to."""

    versions: dict[int, str]
    """SHA-256 of each version's file."""
    rows: list[tuple[Any, ...]]
    """Of the history: what does not depend on time and bytes."""
    updates: int
    doubled: int
    """Tasks with more than one update."""
    tracebacks: int
    seconds: float
    kills: Counter[str]
    round_s: list[float]
    bytes: tuple[int, int]
    """Of the aggregator's link: sent, received."""

    @property
    def bits(self) -> tuple[Any, ...]:
        """What must be the same however a federation was disturbed."""
        return self.versions, self.rows, self.updates


class Campaign:
    """Three devices, an evaluating one, an aggregator and a Mosquitto; ``job`` and ``device`` are their options."""

    NAMES = ("a", "b", "c")

    def __init__(
        self,
        root: Path,
        artifact: Path,
        data: dict[str, Path],
        *,
        job: dict[str, Any],
        device: dict[str, Any] | None = None,
        url: Callable[[str], str] | None = None,
        prefix: Sequence[str] = (),
        listen: Sequence[str] = (),
        hello_s: float = 2.0,
    ) -> None:
        """``url`` makes of the server's address what clients use, ``prefix`` begins commands, ``listen`` are the server's."""
        root.mkdir(parents=True)
        self.root, self.data, self.job, self.device = root, data, job, device or {}
        self.processes = Processes(root, artifact, hello_s=hello_s, prefix=prefix)
        self.server = Mosquitto(root, *(listen or ["allow_anonymous true"]))
        self.url = (url or str)(self.server.url)
        self.kills: Counter[str] = Counter()

    def run(self, *, timeout_s: float, disturb: Callable[["Campaign"], float] | None = None) -> Came:
        """Run to the end; ``disturb`` does its worst, and says after how many seconds it wants to again."""
        begun = time.monotonic()
        with self.server:
            try:
                for name in ("aggregator", *self.NAMES, "e"):
                    self.start(name)
                again_at = time.monotonic() + 0.5
                while not self.processes.is_over("aggregator"):
                    now = time.monotonic()
                    assert now < begun + timeout_s, (
                        f"not done after {timeout_s:g} s, {self.num_rounds} rounds: {self.processes.log('aggregator')}"
                    )
                    if disturb and now >= again_at:
                        again_at = time.monotonic() + disturb(self)
                    time.sleep(0.02)
                report = self.processes.report("aggregator", timeout_s=timeout_s)
                for name in (*self.NAMES, "e"):
                    self.processes.running[name].wait(90)
            finally:
                self.processes.close()
        return self._came(report, time.monotonic() - begun)

    def kill(self, name: str) -> None:
        """Kill one, by SIGKILL, and start it again."""
        self.kills[name] += 1
        if name == "server":
            self.server.kill()
            self.server.start()
        elif not self.processes.is_over(name):
            self.processes.kill(name)
            self.start(name)

    def start(self, name: str) -> None:
        """Start one of them."""
        function = "aggregate" if name == "aggregator" else "device"
        options = {"mqtt": self.url, "job": JOB, "timeout_s": 120}
        if name == "aggregator":
            options |= {"out": str(self.root / "run"), "keep_versions": 0, **self.job}
        else:
            options |= {
                "data": str(self.data[name]),
                "id": name,
                "state": str(self.root / name),
                "threads": 1,
                **self.device,
            }
            options |= {"role": "evaluate"} if name == "e" else {}
        self.processes.start(name, function, options)

    @property
    def num_rounds(self) -> int:
        """How many rounds have made a version."""
        return max(0, len(list((self.root / "run" / "versions").glob("*.safetensors"))) - 1)

    def _came(self, report: dict[str, Any], seconds: float) -> Came:
        folder = self.root / "run"
        files = [
            path for path in sorted((folder / "versions").glob("*.safetensors")) if path.stem.isdecimal()
        ]
        sql = sqlite3.connect(folder / "ledger.sqlite")
        counts = [n for (n,) in sql.execute("SELECT count(*) FROM updates GROUP BY task_id")]
        sql.close()
        logs = [path.read_text() for path in self.root.glob("*.log") if path.stem != "mosquitto"]
        rows = [
            (row["round"], row["devices"], row["loss"], row["accuracy"], row["train_loss"], row["epsilon"])
            for row in report["history"]
        ]
        return Came(
            versions={int(path.stem): sha256(path.read_bytes()).hexdigest() for path in files},
            rows=rows,
            updates=len(counts),
            doubled=sum(count > 1 for count in counts),
            tracebacks=sum(text.count("Traceback") for text in logs),
            seconds=seconds,
            kills=self.kills,
            round_s=[round(row["seconds"], 1) for row in report["history"][1:]],
            bytes=(report["link_bytes_sent"], report["link_bytes_received"]),
        )


def killing(count: int, *, seed: int, rounds: int) -> Callable[[Campaign], float]:
    """Kill one at random, ``count`` times over the rounds: of ten two aggregators, five devices, one evaluator, two servers."""
    rng, left = random.Random(seed), count

    def kill(campaign: Campaign) -> float:
        nonlocal left
        if not left:
            return 1e9
        if campaign.num_rounds < (count - left) * (rounds - 1) // count:
            return 0.01
        left -= 1
        campaign.kill(
            rng.choice(("aggregator", "aggregator", "a", "b", "b", "c", "c", "e", "server", "server"))
        )
        return rng.uniform(0.0, 0.15)

    return kill
