"""Waits for what another process or thread is to bring about and tells nobody."""

import time
from collections.abc import Callable


def until(
    what: Callable[[], object], timeout_s: float = 20, *, saying: Callable[[], str] = lambda: "waited in vain"
) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, saying()
        time.sleep(0.01)
