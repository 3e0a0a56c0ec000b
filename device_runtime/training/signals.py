"""Signals that wait until what they interrupt is whole."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM)
_EXIT_BY_SIGNAL = 128
_ONE_S = 0.3
"""Signals so close are one: ``timeout`` and programs that run others send theirs on beside the terminal's."""

Handler = Callable[[int, FrameType | None], object]


class Held:
    """While it is entered SIGINT and SIGTERM wait for :meth:`deliver`; a second one does not wait.

    What waited goes to who handled the signal before: Python's own handler of SIGINT raises KeyboardInterrupt. One that nobody
    handled raises SystemExit with 128 and its number, as a shell has it. An ignored one stays so; outside the main thread nothing
    waits.
    """

    def __init__(
        self, on_first: Callable[[], object] = lambda: None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare.

        Args:
            on_first: called when the first one comes.
            clock: seconds.
        """
        self._on_first, self._clock = on_first, clock
        self._found: dict[int, Any] = {}
        self._waiting: tuple[int, float] | None = None

    def __enter__(self) -> "Held":
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in _HELD}
            self._found = {number: handler for number, handler in found.items() if _callable(handler)}
        self._hold()
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()
        if exception[0] is None:
            self.deliver()

    def deliver(self) -> None:
        """Let the signal that waits, if one does, take its way."""
        if self._waiting:
            self._pass_on(self._waiting[0])
            self._waiting = None  # its handler may have taken it, and gone on

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let signals take their way at once in the block."""
        self._restore()
        try:
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        for number in self._found:
            signal.signal(number, self._take)

    def _restore(self) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is None:
            self._waiting = number, self._clock()
            self._on_first()
        elif self._clock() - self._waiting[1] > _ONE_S:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        handler = _callable(self._found[number])
        if handler:
            handler(number, None)


def _callable(handler: Any) -> Handler | None:
    """What is to be called: nothing for a signal that is ignored."""
    if handler is signal.SIG_DFL:
        return _leave
    return handler if callable(handler) else None


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(_EXIT_BY_SIGNAL + number)
