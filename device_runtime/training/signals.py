"""Signals that wait for the end of a step, so that what they interrupt is whole."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM)
_EXIT_BY_SIGNAL = 128

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def held(on_first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block; a second one does not wait.

    What waited goes to who handled the signal before. One that was ignored stays so; outside the main thread nothing waits.

    Args:
        on_first: called when the first one comes.

    Raises:
        SystemExit: of a signal that nobody handled, 128 and its number, as a shell has it.
        KeyboardInterrupt: by Python's own handler of SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found: dict[int, Any] = {number: signal.getsignal(number) for number in _HELD}
    before = {number: handler for number, kept in found.items() if (handler := _callable(kept))}
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if waiting:
            before[number](number, frame)
            return
        waiting.append(number)
        on_first()

    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, found[number])
    for first in waiting:
        before[first](first, None)


def _callable(handler: Any) -> Handler | None:
    """What is to be called: nothing for a signal that is ignored."""
    if handler is signal.SIG_DFL:
        return _leave
    return handler if callable(handler) else None


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(_EXIT_BY_SIGNAL + number)
