"""Who does the tasks: this process, or worker processes; which, and how many, changes no bit of what comes of them."""

import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from os import _exit
from pathlib import Path
from typing import Any, Protocol

from fleetune.toolkit.simulation.jobs import Done, Task, decode_done, decode_task, encode
from fleetune.toolkit.simulation.pool import OnDone, Pool, Ticket


class Workers(Protocol):
    """Does tasks. All methods are called from one thread."""

    def submit(self, task: Task, on_done: OnDone) -> Ticket:
        """Hand a task in; ``on_done`` is called once, with what came of it."""

    def wait_for(self, ticket: Ticket) -> Done:
        """Return what came of it; ConfigError if it killed two workers."""

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more; if it is at work it is finished all the same."""

    def settle(self) -> None:
        """Come to rest, for who wants to measure time: nothing is at work when this returns."""

    def close(self) -> None:
        """Stop."""


class Inline:
    """In this process, at once."""

    def __init__(self, artifact_dir: Path) -> None:
        """Open the artifact."""
        self._bench = make_bench(artifact_dir)

    def submit(self, task: Task, on_done: OnDone) -> Ticket:
        """As :class:`Workers`."""
        ticket = Ticket(task, on_done)
        ticket.settle(self._bench.do(task))
        return ticket

    def wait_for(self, ticket: Ticket) -> Done:
        """As :class:`Workers`."""
        assert ticket.done is not None
        return ticket.done

    def cancel(self, ticket: Ticket) -> None:
        """As :class:`Workers`."""

    def settle(self) -> None:
        """As :class:`Workers`."""

    def close(self) -> None:
        """As :class:`Workers`."""
        self._bench.close()


def processes(artifact_dir: Path, count: int) -> "Pool[WorkerProcess]":
    """Processes of this machine, one thread each. One that dies is replaced, and its task is done again, once."""
    return Pool(partial(WorkerProcess, artifact_dir), _arrivals, count)


class WorkerProcess:
    """One process."""

    def __init__(self, artifact_dir: Path) -> None:
        """Start it."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, artifact_dir), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, content: bytes) -> None:
        """Send a task."""
        with suppress(OSError):  # it is dead, which reading from it tells
            self.connection.send_bytes(content)

    def stop(self) -> None:
        """Kill it."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.process.close()


def _arrivals(
    at_work: Sequence[WorkerProcess], timeout_s: float | None
) -> list[tuple[WorkerProcess, Done | None]]:
    by_connection: dict[Any, WorkerProcess] = {one.connection: one for one in at_work}
    return [(by_connection[c], _received(c)) for c in wait(list(by_connection), timeout_s)]


def _received(connection: Any) -> Done | None:
    try:
        return decode_done(connection.recv_bytes())
    except (EOFError, OSError):
        return None


def _work(connection: "Connection[Any, Any]", artifact_dir: Path) -> None:
    """A worker process: tasks in, what came of them out; it ends with whoever started it, at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks.put), daemon=True).start()
    bench = make_bench(artifact_dir)
    while True:
        connection.send_bytes(encode(bench.do(decode_task(tasks.get()))))


def _receive(connection: "Connection[Any, Any]", put: Callable[[bytes], object]) -> None:
    """Read on while a task is at work: who sends the next one does not wait, and whose end has come is seen at once."""
    while True:
        try:
            put(connection.recv_bytes())
        except (EOFError, OSError):
            _exit(0)


def make_bench(artifact_dir: Path) -> Any:
    """Open an artifact where work is done, and nowhere else: it loads onnxruntime."""
    from fleetune.toolkit.simulation.bench import Bench

    return Bench(artifact_dir)
