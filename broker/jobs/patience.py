"""How patient the aggregator is, which a restart may change."""

from typing import Annotated

import msgspec

from fleetune.device_runtime.contracts.fields import (
    SECONDS_MAX,
)
from fleetune.device_runtime.options import Option

UPLOADS_MB = 256.0
"""Updates that are fetched at once, unless the operator says otherwise: what they take of the memory."""


class Patience(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the aggregator waits for what, how much it holds (updates on their way), and how much of the past it keeps."""

    deadline_s: Annotated[
        float,
        Option(
            "seconds after which a round closes, or is extended by as much; 0 for never",
            at_least=0,
            at_most=SECONDS_MAX,
        ),
    ] = 600.0
    grace_s: Annotated[
        float,
        Option(
            "seconds that a round which has min_clients updates waits for devices that are gone, once all others have answered",
            at_least=0,
            at_most=SECONDS_MAX,
        ),
    ] = 10.0
    gather_s: Annotated[
        float, Option("seconds the first round waits for all clients, then for min_clients", at_least=0)
    ] = 60.0
    evaluation_s: Annotated[
        float,
        Option("seconds to wait for the next report after the last round; 0 for ever", at_least=0),
    ] = 600.0
    secure_s: Annotated[
        float,
        Option(
            "secure masks: seconds to wait for keys, and for shares, of who is slow",
            above=0,
            at_most=SECONDS_MAX,
        ),
    ] = 60.0
    extensions_max: Annotated[
        int, Option("extensions of one round before the aggregator stops", at_least=0)
    ] = 10
    uploads_mb: Annotated[
        float,
        Option(
            "MB (10^6 bytes) of updates that are fetched at once, by their announced sizes; one always is",
            above=0,
        ),
    ] = UPLOADS_MB
    share: Annotated[
        bool,
        Option(
            "publish what several devices fetch at the same time once for all of them, or send it to each",
            off="no-share",
        ),
    ] = True
    keep_versions: Annotated[
        int, Option("newest versions whose files stay, beside version 0; 0 for all", at_least=0)
    ] = 64
    keep_rounds: Annotated[
        int,
        Option(
            "newest rounds of which all is known by device, and as many lines on those before; 0 for all",
            at_least=0,
        ),
    ] = 1000
