"""The command web."""

from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from fleetune.toolkit.commands.options import ArtifactDir, Json, Verbose, shown
from fleetune.toolkit.commands.running import Watch, call
from fleetune.toolkit.live import messages

if TYPE_CHECKING:
    from fleetune.toolkit.web import WebReport


def web(
    artifact_dir: ArtifactDir,
    *,
    mqtt: Annotated[
        str | None,
        shown(
            "MQTT server over WebSockets, ws://host:port or wss://host:port, for who joins a job",
            metavar="URL",
        ),
    ] = None,
    job: Annotated[str | None, shown("name of the job that the page suggests", metavar="NAME")] = None,
    trust: Annotated[
        str | None,
        shown(
            "public keys (Ed25519, PEM) that the page pins: it takes work of no other aggregator",
            metavar="FILE",
        ),
    ] = None,
    mask_authority: Annotated[
        str | None,
        shown(
            "authorities (PEM) of which one must have signed the certificate of each device that the page masks with; "
            "none, or without it: it masks with any",
            metavar="FILE",
        ),
    ] = None,
    host: Annotated[str | None, shown("address to listen at", "127.0.0.1")] = None,
    port: Annotated[int | None, shown("port to listen at; 0 for any", "8765")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Serve an artifact with a page that trains it in a browser.

    Data stay in the browser. With --mqtt a visitor may join a job there, as a device does.
    """
    call(
        "fleetune.toolkit.web:web",
        locals(),
        argument="artifact_dir",
        watch=Watch("on_note", messages),
        show=_show,
    )


def _show(console: Console, report: "WebReport") -> None:
    console.print(f"served {report.requests} requests at {report.url}")
