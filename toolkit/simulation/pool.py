"""A number of workers of any kind: tasks are handed out in order; one whose worker dies is given to a fresh one, once."""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.simulation.jobs import Done, Task, encode

_AHEAD = 2
"""Tasks that a worker has been given at once: one is at work, and the next needs no message."""
_SEARCHED = 64
"""So many waiting tasks are looked through for one of a device that the worker has served before."""
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


class Worker(Protocol):
    """Does tasks in the order in which it is given them."""

    def give(self, content: bytes) -> None:
        """Give it an encoded task; nothing happens if it is dead."""

    def stop(self) -> None:
        """End it."""


W = TypeVar("W", bound=Worker)
Arrivals = Callable[[Sequence[W], float | None], Sequence[tuple[W, Done | None]]]
"""(workers at work, seconds to wait at most) -> what has come of the first task of some; None of one that has died."""


class _Seat(Generic[W]):
    """A worker, what it has been given and is not done, and which devices it served last."""

    def __init__(self, worker: W) -> None:
        self.worker = worker
        self.tickets: deque[Ticket] = deque()
        self.devices: OrderedDict[str, None] = OrderedDict()

    def give(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)
        self.devices[ticket.task.device] = None
        self.devices.move_to_end(ticket.task.device)
        while len(self.devices) > _REMEMBERED:
            self.devices.popitem(last=False)
        self.worker.give(encode(ticket.task))


class Pool(Generic[W]):
    """:class:`fleetune.toolkit.simulation.workers.Workers` of any kind."""

    def __init__(self, start: Callable[[], W], arrivals: Arrivals[W], count: int) -> None:
        """Start ``count`` of them."""
        self._start, self._arrivals = start, arrivals
        self._waiting: OrderedDict[int, Ticket] = OrderedDict()
        self._is_resting = False
        self._seats: list[_Seat[W]] = []
        try:
            for _ in range(count):
                self._seats.append(_Seat(start()))
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> list[W]:
        """Those that are there now."""
        return [seat.worker for seat in self._seats]

    def submit(self, task: Task, on_done: OnDone) -> Ticket:
        """As of all workers."""
        ticket = Ticket(task, on_done)
        self._waiting[id(ticket)] = ticket
        self._turn(0.0)
        return ticket

    def wait_for(self, ticket: Ticket) -> Done:
        """As of all workers."""
        if id(ticket) in self._waiting:
            self._waiting.move_to_end(id(ticket), last=False)
        while ticket.done is None:
            self._turn(None)
        return ticket.done

    def cancel(self, ticket: Ticket) -> None:
        """As of all workers."""
        self._waiting.pop(id(ticket), None)

    def settle(self) -> None:
        """As of all workers."""
        self._is_resting = True
        while any(seat.tickets for seat in self._seats):
            self._turn(None)
        self._is_resting = False

    def close(self) -> None:
        """As of all workers."""
        for seat in self._seats:
            seat.worker.stop()
        self._seats = []

    def _turn(self, timeout_s: float | None) -> None:
        """Hand out what waits, and take what has come, waiting for it at most so long."""
        self._hand_out()
        by_worker = {id(seat.worker): seat for seat in self._seats if seat.tickets}
        at_work = [seat.worker for seat in by_worker.values()]
        for worker, done in self._arrivals(at_work, timeout_s) if at_work else ():
            if done is None:
                self._bury(by_worker[id(worker)])
            else:
                by_worker[id(worker)].tickets.popleft().settle(done)
        self._hand_out()

    def _bury(self, seat: _Seat[W]) -> None:
        """Replace a worker that died; its tasks go back to the front of those that wait."""
        seat.worker.stop()
        self._seats[self._seats.index(seat)] = _Seat(self._start())
        for ticket in reversed(seat.tickets):
            self._waiting[id(ticket)] = ticket
            self._waiting.move_to_end(id(ticket), last=False)
        blamed = seat.tickets[0]
        blamed.deaths += 1
        if blamed.deaths >= _DEATHS_MAX:
            task = blamed.task
            raise ConfigError(
                f"device {task.device}: {blamed.deaths} workers died over its {task.kind} task of round "
                f"{task.work.rounds_before + 1}; where memory is short, fewer workers or smaller batches need less"
            )

    def _hand_out(self) -> None:
        if self._is_resting:
            return
        for depth in range(_AHEAD):
            for seat in self._seats:
                if self._waiting and len(seat.tickets) <= depth:
                    seat.give(self._pick(seat))

    def _pick(self, seat: _Seat[W]) -> Ticket:
        """The first that waits, or of the first few one of a device that the worker has served before."""
        place = next(iter(self._waiting))
        for _, (other, ticket) in zip(range(_SEARCHED), self._waiting.items(), strict=False):
            if ticket.task.device in seat.devices:
                place = other
                break
        return self._waiting.pop(place)
