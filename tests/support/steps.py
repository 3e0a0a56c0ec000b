"""How much work something is, counted and not timed: the same on every machine. Loops in C are not seen.

The collector stands still meanwhile: its finalizers and callbacks (hypothesis has one) would be counted where they fall.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def calls_of(work: Callable[[], object]) -> int:
    """How many functions were called, of Python's and of C's."""
    count = 0

    def see(frame: Any, event: str, _: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    with uncollected():
        sys.setprofile(see)
        try:
            work()
        finally:
            sys.setprofile(None)
    return count


class Steps:
    """Instructions of the interpreter, counted while its block runs; ``number`` is there afterwards."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "Steps":
        self._still = uncollected()
        self._still.__enter__()
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._still.__exit__(None, None, None)

    def _trace(self, frame: Any, event: str, _: object) -> Any:
        frame.f_trace_opcodes = True
        self.number += event == "opcode"
        return self._trace
