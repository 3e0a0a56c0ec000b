"""The doctor's look at the MQTT server: is it there, does it let this device in, and may this device say what it has to."""

import socket
import time
from collections.abc import Iterator

from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.commands.findings import FAIL, OK, WARN, Finding
from fleetune.device_runtime.contracts.fields import CHUNK_BYTES
from fleetune.device_runtime.contracts.wire import AggregatorStatus, aggregator_topic, decode, device_topic
from fleetune.device_runtime.errors import TransportError, WireError
from fleetune.device_runtime.network.address import Address, Reach, parse_url
from fleetune.device_runtime.network.hooks import Party
from fleetune.device_runtime.network.link import Link

_HEARD_S = 5.0
_QUIET_S = 2.0
"""A retained status comes at once, if there is one."""


def check_server(mqtt: str, identity: Identity, reach: Reach) -> Iterator[Finding]:
    """Connect as the device would, and say nothing that anybody minds. ConfigError for an address or files of no use."""
    address = parse_url(mqtt)
    if trouble := _unreachable(address, reach.timeout_s):
        remedy = "is the name right, does the server run, and does a firewall let the port through?"
        yield Finding("server", FAIL, f"{address.shown}: {trouble}", remedy)
        return
    yield Finding("server", OK, f"{address.shown} answers")
    own = device_topic(identity.job, identity.device_id, "status")
    link = Link.reaching(
        mqtt,
        reach,
        client_id=f"fleetune-{identity.job}-{identity.device_id}",
        topics=[*identity.topics, own],
        party=Party(denied=_acl_remedy(identity)),
    )
    try:
        link.open(reach.timeout_s)
    except TransportError as exc:
        yield Finding(
            "login",
            FAIL,
            str(exc),
            "FLEETUNE_MQTT_USERNAME and _PASSWORD, or --cert and --key; see docs/operate.md",
        )
        return
    try:
        yield Finding("login", OK, f"let in as {identity.device_id!r}")
        yield from _rights(link, identity, own)
    finally:
        link.close()


def _unreachable(address: Address, timeout_s: float) -> str:
    """Why nothing can be connected to; empty if it can."""
    try:
        socket.create_connection((address.host, address.port), timeout=min(timeout_s, 10.0)).close()
    except OSError as exc:
        return exc.strerror or str(exc) or type(exc).__name__
    return ""


def _acl_remedy(identity: Identity) -> str:
    below = identity.up.rpartition("/")[0]
    return f"the server's access list (ACL) must let this device read and write {below}/#"


def _rights(link: Link, identity: Identity, own: str) -> Iterator[Finding]:
    """An empty message on its own topics is nothing to an aggregator; its own status comes back where both rights are there."""
    remedy, status = _acl_remedy(identity), None
    try:
        link.publish(identity.up, b"")
        link.publish(own, b"")
        until, is_back = time.monotonic() + _HEARD_S, False
        while (left_s := until - time.monotonic()) > 0 and not (is_back and status):
            heard = link.receive(left_s)
            if heard and heard[0] == own and not heard[1]:
                is_back, until = True, min(until, time.monotonic() + _QUIET_S)
            elif heard and heard[0] == aggregator_topic(identity.job):
                status = _status(heard[1]) or status
        link.flush(_QUIET_S)
        link.receive(0.0)  # raises what the server has denied
    except TransportError as exc:
        yield Finding("access list", FAIL, str(exc), remedy)
        return
    if is_back:
        yield Finding("access list", OK, "its own topics can be written and read")
    else:
        yield Finding("access list", FAIL, f"what it says on {own} does not come back", remedy)
    if link.chunk_bytes < CHUNK_BYTES:
        said = f"the server takes packets that hold {link.chunk_bytes} bytes of an adapter; {CHUNK_BYTES} is quickest"
        yield Finding("packet limit", WARN, said, "raise it to 128 kB or more")
    else:
        yield Finding("packet limit", OK, f"{CHUNK_BYTES} bytes of an adapter in a message")
    yield _aggregator(status, identity.job)


def _aggregator(status: AggregatorStatus | None, job: str) -> Finding:
    if status is None:
        remedy = "is --job the aggregator's, has it ever run, and may this device read its status?"
        return Finding("aggregator", WARN, f"nothing is said of job {job!r}", remedy)
    if status.finished:
        return Finding(
            "aggregator",
            WARN,
            f"job {job!r} is over",
            "start it again with more --rounds, or name another --job",
        )
    if not status.online:
        return Finding("aggregator", WARN, f"that of job {job!r} is away", "start it; a device waits for it")
    return Finding("aggregator", OK, f"here, round {status.round}")


def _status(payload: bytes) -> AggregatorStatus | None:
    try:
        found = decode(payload)
    except WireError:
        return None
    return found if isinstance(found, AggregatorStatus) and found.session else None
