"""Device profiles: how quickly a class of devices trains, what memory and power it has, and which network."""

from typing import Annotated

import msgspec

from fleetune.device_runtime.options import Option


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A class of devices."""

    gflops: Annotated[float, Option("sustained fp32 GFLOP/s of matrix products on its CPU", at_least=0)] = 0.0
    slowdown: Annotated[float, Option("instead of gflops: its step time over this machine's", at_least=0)] = (
        0.0
    )
    memory_mb: Annotated[float, Option("memory that training may take, in 10^6 bytes", above=0)] = 1e6
    active_w: Annotated[float, Option("watts while it trains", at_least=0)] = 0.0
    idle_w: Annotated[float, Option("watts while it waits", at_least=0)] = 0.0
    network: Annotated[str, Option("its usual network")] = "wifi"
    source: Annotated[str, Option("where the figures are from; 'estimate' where they are ours")] = ""


PROFILES: dict[str, Profile] = {"reference": Profile(slowdown=1.0)}
