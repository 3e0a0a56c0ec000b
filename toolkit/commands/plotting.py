"""Command that draws runs: plot."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fleetune.toolkit import live
from fleetune.toolkit.commands.options import Json, Verbose, listed, shown
from fleetune.toolkit.commands.running import Watch, call
from fleetune.toolkit.plot import FORMATS


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="folders of train, aggregate, demo or simulate, or an evaluating device's state",
        ),
    ],
    *,
    out: Annotated[
        Path | None, shown("folder to write; the run's own, or `plots` for several", metavar="DIR")
    ] = None,
    format: Annotated[str | None, shown(f"kind of file: {listed(FORMATS)}", "svg", metavar="NAME")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Draw learning curves, several runs in one picture, and confusion matrices."""
    call(
        "fleetune.toolkit.plot:plot",
        locals(),
        argument="runs",
        watch=Watch("on_note", live.messages, aside=True),
        show=_show_files,
    )


def _show_files(console: Console, files: list[Path]) -> None:
    for file in files:
        console.print(str(file), markup=False)
