"""Command that writes configurations to begin with: init."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetune.toolkit.commands.options import JobName, Json, Verbose, shown
from fleetune.toolkit.commands.running import call


def init(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="folder to write; this one without it")
    ] = None,
    *,
    job: JobName = None,
    mqtt: Annotated[
        str | None, shown("MQTT server, without a login", "mqtts://server:8883", metavar="URL")
    ] = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="write over files that are there", show_default=False)
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write commented configurations for aggregator, device and evaluating device."""
    flags = locals() | {"folder": folder or Path()}
    call("fleetune.toolkit.initial:init", flags, argument="folder", show=_show)


def _show(console: Console, written: Any) -> None:
    for file, command in zip(written.files, written.commands, strict=True):
        console.print(f"{file}: {command}", markup=False)
