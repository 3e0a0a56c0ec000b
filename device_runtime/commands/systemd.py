"""Tells systemd that this process is ready, alive, and what it is at; where no service manager listens, nothing."""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_BEATS_A_WATCHDOG = 4


class Notifier:
    """This process as systemd's ``Type=notify`` service; a word that cannot be delivered is dropped.

    Source: sd_notify(3), sd_watchdog_enabled(3).
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare.

        Args:
            environment: ``NOTIFY_SOCKET``, a path or (with a leading ``@``) an abstract address; ``WATCHDOG_USEC`` and
                ``WATCHDOG_PID``, as systemd sets them.
            clock: seconds of a monotonic clock.
        """
        self.status = ""
        """What it is at, one line; sent by the next word."""
        self._address, self._clock = environment.get("NOTIFY_SOCKET", ""), clock
        watchdog_s = _watchdog_s(environment)
        self._is_watched = watchdog_s > 0
        self._period_s = min(_PERIOD_S, watchdog_s / _BEATS_A_WATCHDOG) if self._is_watched else _PERIOD_S
        self._due, self._told, self._has_failed = float("-inf"), "", False

    def ready(self) -> None:
        """Say that the start is over; from now on systemd wants ``beat``."""
        self._say("READY=1")

    def beat(self) -> None:
        """Feed the watchdog and tell a new status: call it between any two pieces of work, it says only what is due."""
        now = self._clock()
        if self._address and now >= self._due:
            self._due = now + self._period_s
            self._say(*["WATCHDOG=1"] * self._is_watched)

    @property
    def due_at(self) -> float:
        """Time at which ``beat`` next has something to say; inf for never."""
        return self._due if self._address and (self._is_watched or self.status != self._told) else math.inf

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._say("STOPPING=1")

    def _say(self, *words: str) -> None:
        status = self.status
        if status != self._told:
            words = (*words, f"STATUS={' '.join(status.split())}")
        if not self._address or not words:
            return
        try:
            _send(self._address, "\n".join(words))
            self._told = status
        except OSError as exc:
            log.log(logging.DEBUG if self._has_failed else logging.WARNING, "no word to systemd: %s", exc)
            self._has_failed = True


def _send(address: str, words: str) -> None:
    """Never waits: a service manager that is slow to read must not stop training."""
    abstract_or_path = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.setblocking(False)
        end.sendto(words.encode(), abstract_or_path)


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """Seconds within which systemd wants a word; 0 where it wants none of this process."""
    interval, owner = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(os.getpid()))
    return int(interval) / 1e6 if interval.isdecimal() and owner == str(os.getpid()) else 0.0
