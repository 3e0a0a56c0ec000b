"""The aggregator of ``benchmarks/crowd.py`` in a process of its own, with its ledger on disk; prints one JSON object at the end.

Usage: crowd.py URL MB COUNT ROUNDS FOLDER LIVING [timed]. Says ``hellos`` when a third of the devices were heard, and ``doomed``
when one that is not among the first LIVING sends its update, and ``round`` at the end of each. The first round, in which nothing
is fetched, is in none of the figures but ``first_s`` and ``closed_after_s``.
"""

import json
import resource
import statistics
import sys
import time
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np

from fleetune.broker.heap import keep_freed
from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.service.ticks import Ticks
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.contracts.wire import Chunk, UpdateReady, Verdict, decode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.link import Link, Will

JOB, ARTIFACT = "crowd", "a" * 64
FETCHED = "fetch_seconds"
"""What a device tells of how long a version took to come."""


def adapter_of(size_mb: float) -> dict[str, np.ndarray]:
    """Version 0, float32 by name."""
    return {"w": np.zeros((8, max(1, int(size_mb * 1e6 / 32))), np.float32)}


class WatchedLink(Link):
    """A link of which a watch hears what it sends."""

    watch: "Watch | None" = None

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """As any link."""
        super().publish(topic, payload, retain=retain)
        if self.watch:
            self.watch.tell(topic, payload)


class Watch:
    """When devices send, where some are to be lost or each is timed: for that each message is decoded once more."""

    def __init__(self, num_living: int) -> None:
        self._num_living, self._heard_at, self._is_doomed = num_living, 0.0, False
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._fetched: list[float] = []

    def hear(self, topic: str, payload: bytes, *, is_first_round: bool) -> None:
        """Take a message that has come."""
        name, now = topic.split("/")[-2], time.perf_counter()
        if not name.startswith("device-") or not payload:
            return
        message = decode(payload)
        if isinstance(message, UpdateReady):
            self._began.setdefault(name, now)
            self._fetched += [message.stats[FETCHED]] if message.stats.get(FETCHED) else []
        if not is_first_round:
            return
        if int(name.removeprefix("device-")) < self._num_living:
            self._heard_at = now
        elif not self._is_doomed and isinstance(message, Chunk):
            print("doomed", flush=True)
            self._is_doomed = True

    def tell(self, topic: str, payload: bytes) -> None:
        """Take a message that is sent: a verdict leaves when the update is on disk."""
        name = topic.split("/")[-2]
        if payload and name in self._began and isinstance(decode(payload), Verdict):
            self._took[name] = time.perf_counter() - self._began.pop(name)

    def figures(self, *, first_closed_at: float) -> dict[str, float]:
        """Seconds from a living device's last word to the first round's end; of uploads till on disk; of downloads, as told."""
        found = {"closed_after_s": round(first_closed_at - self._heard_at, 3)} if self._is_doomed else {}
        if took := self._took.values():
            middle = statistics.median(took)
            found |= {"upload_s": round(middle, 3), "slowest_upload": round(max(took) / middle, 2)}
        if self._fetched:
            found |= {"download_s": round(statistics.median(self._fetched), 3)}
        return found


def main(
    url: str, size_mb: str, count: str, rounds: str, folder: str, living: str, is_timed: str = ""
) -> None:
    """Run a job, and print what its rounds took."""
    keep_freed()
    num_devices, num_rounds, num_living = int(count), int(rounds) + 1, int(living)
    watch = Watch(num_living) if num_living < num_devices or is_timed else None
    settings = Settings(
        job=JOB,
        artifact=ARTIFACT,
        rounds=num_rounds,
        clients=num_devices,
        min_clients=num_living,
        work=LocalWork(steps=1),
        down_codec="whole",
    )
    link = WatchedLink(url, client_id="aggregator", topics=topics(JOB), will=Will(*will(JOB, "s")))
    marks, link.watch = [], watch

    def mark(row: object = None) -> None:
        cpu_s = time.process_time()
        marks.append((time.perf_counter(), cpu_s, link.bytes_sent, link.messages_sent, counts["received"]))
        if row:
            print("round", flush=True)

    counts = {"received": 0}
    with Ledger(Path(folder), settings) as ledger, link:
        mark()
        service = Service(
            link,
            ledger,
            settings,
            patience=Patience(deadline_s=0),
            adapter=adapter_of(float(size_mb)),
            session="s",
            now=time.monotonic(),
            on_row=lambda row: mark(row) if row.round else None,
        )
        heard: set[str] = set()
        service.tick(time.monotonic())
        ticks = Ticks(service)
        while not service.finished:
            if message := link.receive(0.1):
                counts["received"] += 1
                if watch:
                    watch.hear(*message, is_first_round=len(marks) == 1)
                if len(heard) < num_devices / 3:
                    heard.add(message[0])
                    if len(heard) >= num_devices / 3:
                        print("hellos", flush=True)
                service.take(*message, time.monotonic(), has_more=link.has_waiting)
            ticks.turn(time.monotonic(), has_more=link.has_waiting)
        figures = _figures(marks)
        service.stop(time.monotonic())
        last = (Path(folder) / "versions" / f"{num_rounds:05d}.safetensors").read_bytes()
        figures |= {
            "connections": link.connections,
            "dropped": link.dropped,
            "digest": sha256(last).hexdigest()[:16],
        }
        figures |= watch.figures(first_closed_at=marks[1][0]) if watch else {}
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures), flush=True)


def _figures(marks: list[tuple[float, ...]]) -> dict[str, float]:
    took = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(marks)]
    wall_s, cpu_s, sent, messages, received = (
        statistics.median(column) for column in zip(*took[1:], strict=True)
    )
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "mean_cpu_s": statistics.mean(row[1] for row in took[1:]),
        "sent_mb": sent / 1e6,
        "messages_sent": messages,
        "messages_received": received,
        "first_s": took[0][0],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
