"""A device that is killed with its first update made, masked where it is to be, and not sent."""

import os
import signal
from typing import Any

import flat

from fleetune.device_runtime.agent.deliveries import Deliveries


def device(artifact: str, **options: Any) -> Any:
    """As :func:`flat.device`, until then."""
    Deliveries.put = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    return flat.device(artifact, **options)
