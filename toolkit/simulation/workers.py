"""Who does the tasks: this process, or worker processes; which, and how many, changes no bit of what comes of them."""

import multiprocessing
import queue
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from os import _exit
from pathlib import Path
from typing import Any, Protocol

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.simulation.jobs import Done, Task, decode_done, decode_task, encode

_AHEAD = 2
"""Tasks that a process has been given at once: one is at work, one waits for no message."""
_SEARCHED = 64
"""So many waiting tasks are looked through for one of a device that a process has served before."""
_REMEMBERED = 64
_DEATHS_MAX = 2

OnDone = Callable[[Done], object]


class Ticket:
    """A task that was handed in."""

    def __init__(self, task: Task, on_done: OnDone) -> None:
        """Prepare; ``on_done`` is called once, when it is done."""
        self.task, self.deaths = task, 0
        self.done: Done | None = None
        self._on_done = on_done

    def settle(self, done: Done) -> None:
        """Note what came of it."""
        self.done = done
        self._on_done(done)


class Workers(Protocol):
    """Does tasks. All methods are called from one thread."""

    def submit(self, task: Task, on_done: OnDone) -> Ticket:
        """Hand a task in."""

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
        self._bench = _make_bench(artifact_dir)

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


class Processes:
    """Processes of this machine, one thread each. One that dies is replaced, and its task is done again, once."""

    def __init__(self, artifact_dir: Path, count: int) -> None:
        """Start ``count`` of them."""
        self._artifact_dir = artifact_dir
        self._waiting: OrderedDict[int, Ticket] = OrderedDict()
        self._is_resting = False
        self._workers = [_Worker(artifact_dir) for _ in range(count)]

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [worker.process.pid or 0 for worker in self._workers]

    def submit(self, task: Task, on_done: OnDone) -> Ticket:
        """As :class:`Workers`."""
        ticket = Ticket(task, on_done)
        self._waiting[id(ticket)] = ticket
        self._take(0.0)
        return ticket

    def wait_for(self, ticket: Ticket) -> Done:
        """As :class:`Workers`."""
        if id(ticket) in self._waiting:
            self._waiting.move_to_end(id(ticket), last=False)
        while ticket.done is None:
            self._take(None)
        return ticket.done

    def cancel(self, ticket: Ticket) -> None:
        """As :class:`Workers`."""
        self._waiting.pop(id(ticket), None)

    def settle(self) -> None:
        """As :class:`Workers`."""
        self._is_resting = True
        while any(worker.tickets for worker in self._workers):
            self._take(None)
        self._is_resting = False

    def close(self) -> None:
        """As :class:`Workers`."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _take(self, timeout_s: float | None) -> None:
        """Take what has come, waiting for it at most so long, and hand out what waits."""
        self._hand_out()
        by_connection = {w.connection: w for w in self._workers if w.tickets}
        for connection in wait(list(by_connection), timeout_s):
            self._hear(by_connection[connection])  # type: ignore[index]
        self._hand_out()

    def _hear(self, worker: "_Worker") -> None:
        try:
            content = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._bury(worker)
            return
        worker.tickets.popleft().settle(decode_done(content))

    def _bury(self, worker: "_Worker") -> None:
        """Replace a process that died; its tasks go back to the front of those that wait."""
        worker.stop()
        self._workers[self._workers.index(worker)] = _Worker(self._artifact_dir)
        for ticket in reversed(worker.tickets):
            self._waiting[id(ticket)] = ticket
            self._waiting.move_to_end(id(ticket), last=False)
        blamed = worker.tickets[0]
        blamed.deaths += 1
        if blamed.deaths >= _DEATHS_MAX:
            raise ConfigError(
                f"device {blamed.task.device}: {blamed.deaths} workers died over its {blamed.task.kind} task of round "
                f"{blamed.task.work.rounds_before + 1}; where memory is short, fewer --workers or smaller batches need less"
            )

    def _hand_out(self) -> None:
        if self._is_resting:
            return
        for depth in range(_AHEAD):
            for worker in self._workers:
                if self._waiting and len(worker.tickets) <= depth:
                    worker.give(self._pick(worker))

    def _pick(self, worker: "_Worker") -> Ticket:
        """The first that waits, or of the first few one of a device that the process has served before."""
        first = next(iter(self._waiting))
        for _, (place, ticket) in zip(range(_SEARCHED), self._waiting.items(), strict=False):
            if ticket.task.device in worker.devices:
                first = place
                break
        return self._waiting.pop(first)


class _Worker:
    """One process, and what it has been given, in order."""

    def __init__(self, artifact_dir: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, artifact_dir), daemon=True)
        self.process.start()
        theirs.close()
        self.tickets: deque[Ticket] = deque()
        self.devices: OrderedDict[str, None] = OrderedDict()

    def give(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)
        self.devices[ticket.task.device] = None
        self.devices.move_to_end(ticket.task.device)
        while len(self.devices) > _REMEMBERED:
            self.devices.popitem(last=False)
        try:
            self.connection.send_bytes(encode(ticket.task))
        except OSError:
            pass  # it is dead, which reading from it tells

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.process.close()


def _work(connection: Connection, artifact_dir: Path) -> None:
    """A worker process: tasks in, what came of them out; it ends with whoever started it, at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    bench = _make_bench(artifact_dir)
    while True:
        connection.send_bytes(encode(bench.do(decode_task(tasks.get()))))


def _receive(connection: Connection, tasks: "queue.SimpleQueue[bytes]") -> None:
    while True:
        try:
            tasks.put(connection.recv_bytes())
        except (EOFError, OSError):
            _exit(0)


def _make_bench(artifact_dir: Path) -> Any:
    from fleetune.toolkit.simulation.bench import Bench  # onnxruntime: only where work is done

    return Bench(artifact_dir)
