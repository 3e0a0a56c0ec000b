"""Commands of identity: enrol, and authority with what it does."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetune.toolkit.commands.grouped import Commands, Grouped
from fleetune.toolkit.commands.options import Json, Out, Verbose, needs, shown
from fleetune.toolkit.commands.running import call

_MODULE = "fleetune.broker.authority.authority"
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="folder of the authority")]
Hosts = Annotated[
    list[str] | None, shown("DNS name or IP address of the MQTT server; once for each", metavar="NAME")
]
Days = Annotated[int | None, shown("how long the certificate holds", metavar="DAYS")]


@needs("out")
def enrol(
    name: Annotated[str, typer.Argument(metavar="NAME", help="the device's id")],
    *,
    out: Out = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make this device's key and certificate request.

    The key never leaves this machine. Run again, it says what is there and changes nothing.
    """
    call(
        "fleetune.device_runtime.commands.enrol:enrol",
        locals(),
        argument="name",
        show=_show_enrolment,
        command="enrol",
    )


authority = typer.Typer(
    cls=Commands,
    name="authority",
    help="Sign, list and revoke the certificates of a fleet.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@authority.command(cls=Grouped)
def init(
    folder: Folder,
    *,
    name: Annotated[str | None, shown("what its certificates call it", "fleetune")] = None,
    host: Hosts = None,
    days: Annotated[int | None, shown("how long its own certificates hold", "3650")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make an authority.

    Its own keys, the aggregator's key and certificate, the pair that signs jobs; with --host the server's too.
    """
    _call("init", locals(), show=_show_made)


@authority.command(cls=Grouped)
def server(
    folder: Folder,
    *,
    host: Hosts = None,
    days: Days = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make the MQTT server's certificate, or a new one for the same key."""
    _call("server", locals() | {"host": host or []}, show=_show_signed)


@authority.command(cls=Grouped)
def aggregator(folder: Folder, *, days: Days = None, json: Json = False, verbose: Verbose = False) -> None:
    """Make a new certificate of the aggregator."""
    _call("aggregator", locals(), show=_show_signed)


@authority.command(cls=Grouped)
def sign(
    folder: Folder,
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="what fleetune enrol made: NAME.csr")],
    *,
    days: Annotated[int | None, shown("how long the certificate holds", "365")] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="the name had a certificate before, of this key or another")
    ] = False,
    out: Annotated[Path | None, shown("folder for the device", "devices/NAME in DIR", metavar="DIR")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Sign a device's request.

    The certificate, ca.crt and signing.pub are put into a folder that goes to the device.
    """
    _call("sign", locals(), show=_show_signed)


@authority.command("list", cls=Grouped)
def listing(folder: Folder, *, json: Json = False, verbose: Verbose = False) -> None:
    """List every certificate: name, kind, serial number, end, state."""
    _call("listed", locals(), show=_show_list)


@authority.command(cls=Grouped)
def revoke(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="a device's id, or aggregator")],
    *,
    replaced: Annotated[
        bool, typer.Option("--replaced", help="only those that a newer one replaces")
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Revoke the certificates of a name.

    The server refuses them once it has the new list: fleetune broker --configure again, and start it again.
    """
    _call("revoke", locals(), show=_show_revoked)


def _call(function: str, flags: dict[str, Any], *, show: Any) -> None:
    given = dict(flags)
    if "host" in given:
        given["hosts"] = given.pop("host")
    call(f"{_MODULE}:{function}", given, argument="folder", show=show, command="authority")


def _show_enrolment(console: Console, found: Any) -> None:
    made = "made" if found.is_new else "here already, not changed"
    console.print(f"{found.key}: the key, {made}; it stays on this machine", markup=False)
    console.print(f"{found.request}: the request; fleetune authority sign DIR REQUEST signs it", markup=False)
    state = "the certificate" if found.is_signed else "where the certificate belongs that comes back"
    console.print(f"{found.certificate}: {state}", markup=False)


def _show_made(console: Console, folder: Path) -> None:
    console.print(
        f"{folder}: the authority; keep it on a machine that nobody else uses, and a copy", markup=False
    )
    console.print(
        f"for the aggregator: {folder}/ca.crt, aggregator.crt, aggregator.key, signing.key", markup=False
    )


def _show_signed(console: Console, made: Any) -> None:
    said = "" if made.is_new else " (made before)"
    console.print(
        f"{made.name}: serial {made.serial}, until {made.valid_until}{said}; in {made.folder}", markup=False
    )


def _show_list(console: Console, rows: Any) -> None:
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        console.print(
            f"{row.name:<{width}}  {row.kind:<10}  {row.serial:>40}  {row.valid_until}  {row.state}",
            markup=False,
        )


def _show_revoked(console: Console, done: Any) -> None:
    said = ", ".join(done.serials) or "nothing: it is revoked already"
    console.print(f"{done.name}: revoked {said}", markup=False)
    console.print(f"{done.revocation_list}: for the server", markup=False)
