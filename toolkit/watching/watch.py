"""``fleetune watch``: one local page with a fleet on it, and the same as Prometheus metrics."""

import logging
import os
import secrets
from collections.abc import Callable
from ipaddress import ip_address

from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.options import check
from fleetune.toolkit.pages import answering
from fleetune.toolkit.watching.listener import Listener
from fleetune.toolkit.watching.server import check_token, make_server

log = logging.getLogger(__name__)

TOKEN = "FLEETUNE_WATCH_TOKEN"
"""Environment variable of a token that stays the same from start to start, as Prometheus wants it."""
PORT = 8765
_TURN_S = 0.25


def watch(
    *,
    mqtt: str,
    job: str,
    host: str = "127.0.0.1",
    port: int = PORT,
    reach: Reach = Reach(),
    on_note: Callable[[str], object] | None = None,
) -> None:
    """Serve a page that shows a job, until it is interrupted.

    Who has the address with its token sees it, nobody else; the token is made anew at every start, or is that of
    ``FLEETUNE_WATCH_TOKEN``. While no page is open and nothing is scraped, aggregator and devices are asked for nothing.

    Args:
        mqtt: URL of the MQTT server; the login is the aggregator's.
        job: name of the job.
        host: address to listen on.
        port: TCP port; 0 for any free one.
        reach: how the MQTT server is reached.
        on_note: told the page's address, once it is there.

    Raises:
        ConfigError: an argument is wrong, or the port is taken.
        TransportError: the MQTT server is not there or refuses the login.
    """
    check(reach)
    check_name("job", job)
    token = check_token(os.environ.get(TOKEN) or secrets.token_urlsafe(24))
    say = on_note or log.info
    listener = Listener(mqtt, job, reach)
    server = make_server(host, port, token=token, state=listener.state)
    try:
        listener.open()
        with answering(server):
            where = f"http://{_bracketed(host)}:{server.server_address[1]}"
            say(f"{where}/?token={token}")
            say(f"metrics: {where}/metrics with the header Authorization: Bearer TOKEN")
            if not _is_own(host):
                say(f"{host} is seen by others: what goes over it, the token too, is not encrypted")
            while True:
                listener.turn(_TURN_S)
    finally:
        server.server_close()
        listener.close()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_own(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
