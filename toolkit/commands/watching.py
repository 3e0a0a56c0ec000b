"""Commands that show a fleet: status and watch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fleetune.device_runtime.contracts.scores import LABELS
from fleetune.toolkit import live
from fleetune.toolkit.commands.options import (
    WATCH,
    Config,
    JobName,
    Json,
    Mqtt,
    Verbose,
    needs,
    shown,
    with_flags,
)
from fleetune.toolkit.commands.running import Watch, call
from fleetune.toolkit.watching.state import DeviceState, FleetState

_WIDTH = 160
_STYLES = {
    "gone": "red",
    "silent": "red",
    "refused": "red",
    "paused": "yellow",
    "late": "yellow",
    "slow": "yellow",
}


@needs("mqtt", "job")
@with_flags(WATCH)
def status(
    *,
    mqtt: Mqtt = None,
    job: JobName = None,
    follow: Annotated[
        bool | None, typer.Option("--follow", "-f", help="go on until it is over", show_default=False)
    ] = None,
    wait_s: Annotated[float | None, shown("seconds that devices are waited for at most", "8.0")] = None,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Show a job and its devices as a table.

    The login is the aggregator's. While somebody looks, devices say what they are at.
    """
    call(
        "fleetune.toolkit.watching.status:status",
        locals(),
        parts=WATCH,
        watch=Watch("on_state", _following),
        show=_show,
        command="status",
    )


@needs("mqtt", "job")
@with_flags(WATCH)
def watch(
    *,
    mqtt: Mqtt = None,
    job: JobName = None,
    host: Annotated[str | None, shown("address to serve the page on", "127.0.0.1")] = None,
    port: Annotated[int | None, shown("TCP port of the page; 0 for any free one", "8765")] = None,
    config: Config = None,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Serve a page that shows a job and its devices.

    The login is the aggregator's. Only who has the address that is printed sees the page; /metrics is for Prometheus.
    """
    call(
        "fleetune.toolkit.watching.watch:watch",
        locals(),
        parts=WATCH,
        watch=Watch("on_note", live.messages),
        command="watch",
    )


@contextmanager
def _following(console: Console) -> Iterator[Callable[[FleetState], None]]:
    """Draw the table over itself on a terminal; elsewhere one after another."""
    if not console.is_terminal:
        yield lambda state: _show(console, state)
        return
    with Live(console=console, refresh_per_second=2, transient=True) as moving:

        def show(state: FleetState) -> None:
            moving.update(Group(Text(_headline(state)), _table(state)), refresh=True)

        yield show


def _show(console: Console, state: FleetState) -> None:
    console.print(_headline(state), markup=False)
    if state.devices:  # as wide as it needs: rows that are broken up are hard to read, and to search
        console.print(_table(state), width=max(console.width, _WIDTH), soft_wrap=True)


def _headline(state: FleetState) -> str:
    job = state.job
    of = f" of {job.num_rounds}" if job.num_rounds else ""
    counts = ", ".join(f"{number} {one}" for one, number in sorted(state.counts.items()))
    standing = f"; {job.num_accepted} updates taken, {job.num_pending} awaited" if job.is_open else ""
    measured = {name: value for figures in state.rounds for name, value in figures.measured.items()}
    told = "".join(
        f", {LABELS.get(name, name.replace('_', ' '))} {value:.4g}" for name, value in measured.items()
    )
    return f"job {job.job}: aggregator {job.aggregator}, round {job.round}{of}{standing}{told}; {counts or 'no devices'}"


def _table(state: FleetState) -> Table:
    """A stranger's text goes in as :class:`Text`, in which nothing is markup."""
    table = Table(box=None, pad_edge=False)
    for name in (
        "device",
        "state",
        "at work",
        "steps",
        "s/step",
        "memory",
        "C",
        "sent",
        "received",
        "version",
        "why",
    ):
        table.add_column(name, overflow="fold")
    for device in state.devices:
        table.add_row(
            *(
                Text(cell, _STYLES.get(device.state, "") if i == 1 else "")
                for i, cell in enumerate(_cells(device))
            )
        )
    return table


def _cells(device: DeviceState) -> tuple[str, ...]:
    work = f"{device.phase}, round {device.round}" if device.phase and device.round else device.phase
    return (
        device.device_id,
        device.state,
        work,
        f"{device.step} of {device.steps}" if device.steps else "",
        f"{device.step_s:.3g}" if device.step_s else "",
        live.size(device.memory_mb * 1e6) if device.memory_mb else "",
        f"{device.temperature_c:.0f}" if device.temperature_c else "",
        live.size(device.mb_sent * 1e6) if device.phase else "",
        live.size(device.mb_received * 1e6) if device.phase else "",
        device.software,
        device.why,
    )
