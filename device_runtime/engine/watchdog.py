"""Stops what runs longer than it may, from a thread of its own that sleeps until then.

To be watched costs a look at the clock and an entry in a dictionary; the thread wakes twice in the longest time that is allowed.
"""

import time
from collections.abc import Callable
from threading import Event, Lock, Thread, get_ident

from fleetune.device_runtime.errors import ConfigError

_AGAIN_S = 0.05
"""Between two looks at whether what was told to stop has stopped."""
_LOOK_S = 3600.0
"""No thread can sleep for ever on every machine."""


class Watchdog:
    """A context manager around each piece of work; several threads may be in it at once, and are stopped together."""

    def __init__(
        self, most_s: float, stop: Callable[[bool], object], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare; the thread begins with the first work.

        Args:
            most_s: seconds that a piece of work may take; 0 for any.
            stop: makes what runs fail, told true; told false, what runs from then on may run.
            clock: seconds, monotonic.
        """
        self._most_s, self._stop, self._clock = most_s, stop, clock
        self._until: dict[int, float] = {}
        self._has_stopped = False
        self._lock, self._closed = Lock(), Event()
        self._thread: Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._most_s:
            self._until[get_ident()] = self._clock() + self._most_s
            if self._thread is None:
                self._begin()
        return self

    def __exit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
        if not self._most_s:
            return
        with self._lock:
            del self._until[get_ident()]
            was_stopped = self._has_stopped
            if was_stopped and not self._until:
                self._has_stopped = False
                self._stop(False)
        if was_stopped and isinstance(exc, Exception):
            raise ConfigError(
                f"most_step_seconds: a step was stopped, as it took longer than {self._most_s:,.15g} s"
            ) from exc

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()

    def _watch(self) -> None:
        while not self._closed.wait(self._wait_s()):
            with self._lock:
                if not self._has_stopped and self._first() <= self._clock():
                    self._has_stopped = True
                    self._stop(True)

    def _wait_s(self) -> float:
        return _AGAIN_S if self._has_stopped else min(max(0.0, self._first() - self._clock()), _LOOK_S)

    def _first(self) -> float:
        """When the first of what runs must be done; of what begins now, if nothing runs."""
        return min(self._until.copy().values(), default=self._clock() + self._most_s)
