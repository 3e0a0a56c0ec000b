"""Progress as people read it: moving bars and tables on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

COLUMNS = ("round", "devices", "loss", "accuracy", "down", "up", "seconds")
_PLAIN_EVERY_S = 5.0

Callback = Callable[[Any], None]


@contextmanager
def messages(console: Console) -> Iterator[Callback]:
    """Print each message on a line of its own."""
    yield lambda message: console.print(str(message), markup=False)


@contextmanager
def remarks(console: Console) -> Iterator[Callback]:
    """Print each remark on standard error, beside results that something else may read."""
    aside = Console(stderr=True, highlight=False, soft_wrap=True)
    yield lambda remark: aside.print(str(remark), markup=False)


@contextmanager
def steps(console: Console) -> Iterator[Callback]:
    """Follow steps (reports with ``step``, ``loss``, ``seconds``): a bar, or a line every few seconds."""
    if not console.is_terminal:
        yield _plain_steps(console)
        return
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        yield lambda report: progress.update(
            task,
            completed=report.step + 1,
            total=getattr(report, "total_steps", None),
            description=f"loss {report.loss:.4f}",
        )


@contextmanager
def rounds(console: Console) -> Iterator[Callback]:
    """Follow rounds (rows as in ``AggregateReport.history``): a growing table, or a line a round."""
    if not console.is_terminal:
        console.print("  ".join(f"{name:>8}" for name in COLUMNS), markup=False)
        yield lambda row: console.print("  ".join(f"{cell:>8}" for cell in cells(row)), markup=False)
        return
    table = Table(*COLUMNS)
    with Live(table, console=console, refresh_per_second=2):
        yield lambda row: table.add_row(*cells(row))


@contextmanager
def demo_events(console: Console) -> Iterator[Callback]:
    """Print lines of text as they come, and follow the rounds below them."""
    with ExitStack() as stack:
        follow: list[Callback] = []

        def show(event: Any) -> None:
            if isinstance(event, str):
                console.print(event, markup=False)
                return
            if not follow:
                follow.append(stack.enter_context(rounds(console)))
            follow[0](event)

        yield show


def cells(row: Any) -> tuple[str, ...]:
    """A round as the table shows it, in the order of COLUMNS; what was not measured is a dash."""
    return (
        str(row.round),
        str(row.devices),
        _fixed(row.loss, ".4f"),
        _fixed(row.accuracy, ".3f"),
        size(row.bytes_down),
        size(row.bytes_up),
        _fixed(row.seconds, ".1f"),
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
    next_at = [time.monotonic()]

    def line(report: Any) -> None:
        if time.monotonic() >= next_at[0]:
            console.print(
                f"step {report.step + 1}: loss {report.loss:.4f}, {1000 * report.seconds:.0f} ms",
                markup=False,
            )
            next_at[0] = time.monotonic() + _PLAIN_EVERY_S

    return line
