"""Command of the simulator's running core: simulate."""

from pathlib import Path
from typing import Annotated

import typer

from fleetune.toolkit import live
from fleetune.toolkit.commands.options import Json, Verbose, shown
from fleetune.toolkit.commands.running import Watch, call


def simulate(
    file: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, see docs/simulation.md")],
    *,
    out: Annotated[Path | None, shown("folder to write", "NAME-SEED of the file", metavar="DIR")] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume", help="only go on with what lies in --out", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, shown("worker processes; 0 for one a core", "the file's", metavar="N")
    ] = None,
    ray: Annotated[
        str | None,
        shown("Ray cluster that works in their place; `local` starts one here", metavar="ADDRESS"),
    ] = None,
    set: Annotated[
        list[str] | None,
        shown(
            "KEY=VALUE over the file, as work.policy.drop=0.5; may be given several times",
            metavar="KEY=VALUE",
        ),
    ] = None,
    charts: Annotated[
        bool | None,
        typer.Option(
            "--charts/--no-charts", help="draw the run, where matplotlib is installed", show_default=False
        ),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train with a fleet of virtual devices under a virtual clock."""
    call(
        "fleetune.toolkit.simulation.simulate:simulate",
        locals(),
        argument="file",
        watch=Watch("on_progress", live.simulated, notes="on_note", aside=True),
    )
