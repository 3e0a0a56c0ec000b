"""Command that looks a device over: doctor."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetune.toolkit import live
from fleetune.toolkit.commands.options import (
    DEVICE,
    Config,
    Data,
    JobName,
    Json,
    Mqtt,
    Rules,
    Verbose,
    shown,
    with_flags,
)
from fleetune.toolkit.commands.running import EXIT_OURS, Watch, call


@with_flags(DEVICE)
def doctor(
    artifact_dir: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="artifact folder, made by `fleetune export`")
    ] = None,
    *,
    data: Data = None,
    mqtt: Mqtt = None,
    job: JobName = None,
    id: Annotated[str | None, shown("name of this device", "as `device` has it")] = None,
    state: Annotated[Path | None, shown("the device's state folder", metavar="DIR")] = None,
    rules: Rules = None,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Look this device over: one line each, ok, warn or fail, with the remedy.

    It takes what `device` takes, and its [device] table. Exit code 1 if something fails.
    """
    found = call(
        "fleetune.device_runtime.commands.doctor:doctor",
        locals(),
        argument="artifact_dir",
        parts=DEVICE,
        watch=Watch("on_finding", live.messages),
        show=_show_nothing_more,
        command="doctor",
        table="device",
    )
    if not found.ok:
        raise typer.Exit(EXIT_OURS)


def _show_nothing_more(console: Console, found: Any) -> None:
    """Every finding was told when it was made."""
