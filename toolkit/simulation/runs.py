"""Tasks on their way: from the journal if they were done in an earlier life, else by the workers and then into it."""

from functools import partial

from fleetune.toolkit.simulation.jobs import Done, Task
from fleetune.toolkit.simulation.journal import Journal
from fleetune.toolkit.simulation.pool import Ticket
from fleetune.toolkit.simulation.workers import Workers


class Begun:
    """A task that is being done, or was in an earlier life."""

    def __init__(self, workers: Workers, ticket: Ticket | None, found: Done | None) -> None:
        self._workers, self._ticket, self._found = workers, ticket, found

    @property
    def is_done(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._ticket is None or self._ticket.done is not None

    def wait(self) -> Done:
        """Return what comes of it; errors as of :meth:`Workers.wait_for`."""
        if self._found is None and self._ticket:
            self._found, self._ticket = self._workers.wait_for(self._ticket), None
        assert self._found is not None
        return self._found

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self._ticket:
            self._workers.cancel(self._ticket)


class Runs:
    """The tasks of one simulation."""

    def __init__(self, workers: Workers, journal: Journal) -> None:
        """Prepare; both stay open."""
        self.found = 0
        """How many were in the journal."""
        self._workers, self._journal = workers, journal

    def begin(self, task: Task) -> Begun:
        """Have a task done."""
        found = self._journal.find(task)
        if found is not None:
            self.found += 1
            return Begun(self._workers, None, found)
        ticket = self._workers.submit(task, partial(self._journal.keep, task))
        return Begun(self._workers, ticket, None)
