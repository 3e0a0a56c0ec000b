"""The other end of ``benchmarks/link.py``: echoes, and serves content in chunks until it is ended.

Usage: link_far.py URL MODE SIZE…; each SIZE of content can be asked for. MODE ``nagle`` leaves Nagle's algorithm on.
"""

import sys

from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import Request, UpdateReady, decode, encode
from fleetune.device_runtime.network import client
from fleetune.device_runtime.network.link import Link

PING_BYTES = 40


def main(url: str, mode: str, *sizes: str) -> None:
    """Answer for ever."""
    if mode == "nagle":
        client._send_at_once = lambda *_: None
    contents = {size.encode(): Outgoing(bytes(int(size))) for size in sizes}
    outgoing = contents[sizes[0].encode()]
    with Link(url, client_id="far", topics=["bench/link/down"]) as link:
        print("ready", flush=True)
        while True:
            if (message := link.receive(60.0)) is None:
                continue
            payload = message[1]
            if len(payload) == PING_BYTES:
                link.publish("bench/link/up", payload)
            elif payload in contents:
                outgoing = contents[payload]
                link.publish("bench/link/up", encode(_announcement(outgoing)))
            elif isinstance(request := decode(payload), Request):
                for chunk in outgoing.chunks(request):
                    link.publish("bench/link/up", encode(chunk))


def _announcement(outgoing: Outgoing) -> UpdateReady:
    return UpdateReady(
        device_id="far",
        job="bench",
        task_id="t",
        round=1,
        version=0,
        codec="fp32",
        num_samples=1,
        payload=outgoing.manifest,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
