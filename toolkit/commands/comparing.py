"""Command of the simulator: compare."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetune.toolkit.commands.options import Json, Verbose, shown
from fleetune.toolkit.commands.running import call, fail_usage
from fleetune.toolkit.simulation.tables import show_comparison


def compare(
    dirs: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="runs of fleetune simulate, or folders of them")
    ],
    *,
    to: Annotated[
        str | None,
        shown("shares of the reference's final accuracy, as a,b", "0.95 and 0.99", metavar="SHARES"),
    ] = None,
    of: Annotated[
        str | None, shown("arm that is the reference", "that of the first run", metavar="NAME")
    ] = None,
    charts: Annotated[Path | None, shown("folder to draw charts into", metavar="DIR")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare simulated runs: what each arm cost until it was as good as the reference."""
    flags = locals() | {"to": _shares(to)}
    call("fleetune.toolkit.simulation.compare:compare", flags, argument="dirs", show=_show)


def _shares(text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(word) for word in text.split(",")) if text else None
    except ValueError:
        fail_usage(f"--to {text}: expected numbers, as 0.95,0.99", command="compare")


def _show(console: Console, comparison: Any) -> None:
    for line in show_comparison(comparison):
        console.print(line, markup=False)
