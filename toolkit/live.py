"""Progress as people read it: moving bars and tables on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.spinner import Spinner
from rich.text import Text

from fleetune.device_runtime.contracts.scores import ACCURACY, LABELS

COLUMNS = ("round", "devices", "trained", "loss", ACCURACY, "down", "up", "seconds")
"""``trained``: mean loss of the devices' last steps; ``loss`` and the score are those of the evaluating devices."""
_SCORE = COLUMNS.index(ACCURACY)
_PLAIN_EVERY_S = 5.0

Callback = Callable[[Any], None]


@contextmanager
def messages(console: Console) -> Iterator[Callback]:
    """Print each message on a line of its own."""
    yield lambda message: console.print(str(message), markup=False)


@contextmanager
def dated(console: Console) -> Iterator[Callback]:
    """Print each message on a line of its own after the time, which systemd's journal adds by itself."""
    has_dates = "JOURNAL_STREAM" in os.environ

    def show(message: Any) -> None:
        now = "" if has_dates else time.strftime("%Y-%m-%d %H:%M:%S ")
        console.print(f"{now}{message}", markup=False)

    yield show


@contextmanager
def samples(console: Console) -> Iterator[Callback]:
    """Follow samples (``done`` of ``total``): a bar that goes when all is done, or a line every few seconds."""
    if not console.is_terminal:
        yield _now_and_then(console, lambda at: f"{at.done} of {at.total} samples", first_s=_PLAIN_EVERY_S)
        return
    with Progress(*_columns("sample"), console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda at: progress.update(task, completed=at.done, total=at.total)


@contextmanager
def steps(console: Console) -> Iterator[Callback]:
    """Follow steps (reports with ``step``, ``loss``, ``seconds``): a bar, or a line every few seconds."""
    if not console.is_terminal:
        yield _plain_steps(console)
        return
    with Progress(*_columns("step"), console=console, redirect_stderr=_has_tty()) as progress:
        task = progress.add_task("", total=None)
        yield lambda report: progress.update(
            task,
            completed=report.step + 1,
            total=getattr(report, "total_steps", None),
            description=f"loss {report.loss:.4f}",
        )
        progress.update(task, visible=bool(progress.tasks[0].completed))


@contextmanager
def simulated(console: Console) -> Iterator[Callback]:
    """Follow simulated rounds (``round`` of ``rounds``, ``time_s``, ``accuracy``): a bar with the time left, or a line each."""
    if not console.is_terminal:
        yield lambda at: console.print(f"round {at.round} of {at.rounds}: {_simulated(at)}", markup=False)
        return
    with Progress(*_columns("round"), console=console, redirect_stderr=_has_tty()) as progress:
        task = progress.add_task("", total=None)
        yield lambda at: progress.update(
            task, completed=at.round, total=at.rounds, description=_simulated(at)
        )


def _simulated(at: Any) -> str:
    return f"{at.time_s:.0f} virtual s, accuracy {_fixed(at.accuracy, '.3f')}"


def _columns(what: str) -> tuple[ProgressColumn, ...]:
    """``what`` 3/8, a bar, the task's description, and the time it took and will take."""
    return (
        TextColumn(what),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


@contextmanager
def rounds(console: Console) -> Iterator[Callback]:
    """Follow rounds: rows as in ``AggregateReport.history``, a line each below one header, and lines of text among them.

    On a terminal a line below them moves; whatever else is printed or logged comes above it, and nothing is painted over.
    """
    is_first = True

    def show(event: Any) -> None:
        nonlocal is_first
        if is_first and not isinstance(event, str):
            is_first = False
            console.print(_aligned(columns(event)), markup=False)
        console.print(event if isinstance(event, str) else _aligned(cells(event)), markup=False)

    if not console.is_terminal:
        yield show
        return
    moving = Spinner("dots", Text("at work"))
    with Live(moving, console=console, refresh_per_second=4, transient=True, redirect_stderr=_has_tty()):
        yield show


def _has_tty() -> bool:
    """Whether what is logged is seen on the terminal: then it goes above what moves there; a file gets it as it is."""
    return sys.stderr.isatty()


def _aligned(words: Iterable[str]) -> str:
    return "  ".join(f"{word:>8}" for word in words)


def columns(row: Any) -> tuple[str, ...]:
    """Heads of the table that rows as this one stand in."""
    score = LABELS[getattr(row, "score", "") or ACCURACY]
    named = (*COLUMNS[:_SCORE], score, *COLUMNS[_SCORE + 1 :])
    return named if getattr(row, "epsilon", None) is None else (*named, "epsilon")


def cells(row: Any) -> tuple[str, ...]:
    """A round as the table shows it, in the order of ``columns``; what was not measured is a dash."""
    epsilon = getattr(row, "epsilon", None)
    return (
        str(row.round),
        str(row.devices),
        _fixed(row.train_loss, ".4f"),
        _fixed(row.loss, ".4f"),
        _fixed(getattr(row, getattr(row, "score", "") or ACCURACY), ".3f"),
        size(row.bytes_down),
        size(row.bytes_up),
        _fixed(row.seconds if row.round else None, ".1f"),
        *(() if epsilon is None else (f"{epsilon:.3f}",)),
    )


def size(num_bytes: float) -> str:
    """Bytes for people: ``1.5 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def _fixed(value: float | None, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)


def _plain_steps(console: Console) -> Callback:
    return _now_and_then(
        console, lambda at: f"step {at.step + 1}: loss {at.loss:.4f}, {1000 * at.seconds:.0f} ms"
    )


def _now_and_then(console: Console, line_of: Callable[[Any], str], *, first_s: float = 0.0) -> Callback:
    next_at = [time.monotonic() + first_s]

    def line(report: Any) -> None:
        if time.monotonic() >= next_at[0]:
            console.print(line_of(report), markup=False)
            next_at[0] = time.monotonic() + _PLAIN_EVERY_S

    return line
