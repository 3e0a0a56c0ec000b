"""``fleetune status``: a fleet as a table, once or again and again."""

import time
from collections.abc import Callable

from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.options import check
from fleetune.toolkit.watching.listener import Listener
from fleetune.toolkit.watching.state import FleetState

WAIT_S = 8.0
_TURN_S = 0.1
_EVERY_S = 2.0


def status(
    *,
    mqtt: str,
    job: str,
    follow: bool = False,
    wait_s: float = WAIT_S,
    reach: Reach = Reach(),
    on_state: Callable[[FleetState], object] | None = None,
) -> FleetState:
    """Return how a job stands.

    Args:
        mqtt: URL of the MQTT server; the login is the aggregator's.
        job: name of the job.
        follow: go on until interrupted, or until the job is over.
        wait_s: how long aggregator and devices are waited for at most; those of earlier releases do not answer.
        reach: how the MQTT server is reached.
        on_state: with ``follow``, told every 2 s.

    Raises:
        ConfigError: an argument is wrong.
        TransportError: the MQTT server is not there or refuses the login.
    """
    check(reach)
    check_name("job", job)
    listener = Listener(mqtt, job, reach)
    listener.open()
    try:
        state = _first(listener, wait_s)
        while follow and state.job.aggregator != "finished":
            if on_state:
                on_state(state)
            state = _later(listener, _EVERY_S)
        return state
    finally:
        listener.close()


def _first(listener: Listener, wait_s: float) -> FleetState:
    since = time.monotonic()
    listener.state()  # from now on somebody looks
    while time.monotonic() < since + wait_s and not listener.is_complete(since):
        listener.turn(_TURN_S)
        if listener.state().job.aggregator == "finished":
            break
    return listener.state()


def _later(listener: Listener, seconds: float) -> FleetState:
    until = time.monotonic() + seconds
    while (left_s := until - time.monotonic()) > 0:
        listener.turn(min(left_s, _TURN_S))
    return listener.state()
