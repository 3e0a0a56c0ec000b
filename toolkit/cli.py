"""The console script ``fleetune``: one command per function, the chosen one imported when it is called."""

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from fleetune.toolkit.commands import beginning, comparing, doctoring, plotting, simulating, trust, watching
from fleetune.toolkit.commands import device as training
from fleetune.toolkit.commands import federation as fleet
from fleetune.toolkit.commands import web as pages
from fleetune.toolkit.commands import workstation as models
from fleetune.toolkit.commands.grouped import Commands, Grouped
from fleetune.toolkit.commands.running import EXIT_INTERRUPTED

COMMANDS = (
    models.export,
    models.inspect,
    models.selfcheck,
    models.sign,
    training.train,
    training.predict,
    training.generate,
    fleet.device,
    fleet.aggregate,
    fleet.broker,
    watching.status,
    watching.watch,
    pages.web,
    trust.enrol,
    doctoring.doctor,
    beginning.init,
    simulating.simulate,
    models.merge,
    fleet.demo,
    fleet.bench,
    comparing.compare,
    plotting.plot,
)


app = typer.Typer(
    cls=Commands,
    name="fleetune",
    help="Layer-droppable LoRA training on edge devices, federated over MQTT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": shutil.get_terminal_size().columns,
    },
)
for _command in COMMANDS:
    app.command(cls=Grouped)(_command)
app.add_typer(trust.authority)


def main() -> None:
    """Run the command line and exit: 0 done, 1 ours to report, 2 usage, 130 interrupted."""
    try:
        app(prog_name="fleetune")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        number = version("fleetune")
    except PackageNotFoundError:
        number = "unknown (not installed)"
    sys.stdout.write(f"fleetune {number}\n")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="show the version and leave", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Layer-droppable LoRA training on edge devices, federated over MQTT."""


if __name__ == "__main__":
    main()
