"""The log as JSON, one object a line, for who collects logs."""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import msgspec
from rich.console import Console

from fleetune.device_runtime.agent.events import NO_ROUND, Event

_ROUND = re.compile(r"round (\d+)\b")
_DEVICE = re.compile(r"(?:round \d+: |report of |update of )?device ([A-Za-z0-9][A-Za-z0-9._-]{0,63})\b")
"""How lines of ours begin that are about one; what a stranger said comes later in them."""


class JsonLines(logging.Formatter):
    """``time`` (UTC), ``level``, ``logger``, ``message``; ``round``, ``device`` and ``job`` where they are known."""

    def __init__(self) -> None:
        super().__init__()
        self.context: dict[str, Any] = {}
        """Of every line, unless a line says another."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record down on one line, whatever is in it."""
        message = record.getMessage()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **self.context,
            **_told(message),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def _told(message: str) -> dict[str, Any]:
    """Round and device that a line of ours begins with."""
    number, device = _ROUND.match(message), _DEVICE.match(message)
    found: dict[str, Any] = {"round": int(number[1])} if number else {}
    return found | ({"device": device[1]} if device else {})


def context_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Job and device that a command's arguments name."""
    job, device = arguments.get("job"), arguments.get("id")
    known = {"job": getattr(job, "job", job), "device": device}
    return {name: value for name, value in known.items() if value}


def events(name: str) -> Callable[[Console], Any]:
    """Return what opens a callback that logs all that it is told, under ``name``, in the place of a progress display."""
    log = logging.getLogger(name)

    @contextmanager
    def open_(console: Console) -> Iterator[Callable[[Any], None]]:
        yield lambda told: log.info("%s", _words(told), extra={"fields": _fields(told)})

    return open_


def _words(told: Any) -> str:
    return f"round {told.round}" if isinstance(told, msgspec.Struct) and hasattr(told, "round") else str(told)


def _fields(told: Any) -> dict[str, Any]:
    if isinstance(told, Event):
        of = {} if told.round == NO_ROUND else {"round": told.round}
        return {**of, "event": told.kind, **({"values": dict(told.values)} if told.values else {})}
    if isinstance(told, msgspec.Struct) and hasattr(told, "round"):
        return {"round": told.round, "event": "round", "values": msgspec.to_builtins(told)}
    return {}


def formatter() -> JsonLines | None:
    """The formatter at work; None where the log is no JSON."""
    found = (handler.formatter for handler in logging.getLogger().handlers)
    return next((one for one in found if isinstance(one, JsonLines)), None)


def write_error(lines: JsonLines, message: str) -> None:
    """Write what ended a command as a line of the log."""
    record = logging.LogRecord("fleetune", logging.ERROR, __file__, 0, "%s", (message,), None)
    sys.stderr.write(lines.format(record) + "\n")
