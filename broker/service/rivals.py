"""Two aggregators of one job throw each other off the server for ever: one that comes asks first whether another is there.

The retained status alone does not tell: of an aggregator that was killed while the server was away it says online for ever.
So whoever comes knocks, and only an answer counts.
"""

import time
from collections.abc import Callable

from fleetune.device_runtime.contracts.wire import AggregatorStatus, aggregator_topic, decode, encode
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.network.connection import Connection

ANSWER_S = 5.0
"""How long an aggregator whose retained status says online has for its answer."""


def knock_of(job: str) -> AggregatorStatus:
    """What one that comes says on the topic of the job's status, not retained; devices do not mind it."""
    return AggregatorStatus(job=job, session="", online=False, round=0, version=0)


def is_knock(status: AggregatorStatus) -> bool:
    """Whether a status is the knock of an aggregator that wants the job."""
    return not (status.session or status.online)


def has_rival(link: Connection, job: str, *, clock: Callable[[], float] = time.monotonic) -> bool | None:
    """Whether another aggregator is at work on a job; None if not even what this side says there comes back to it.

    Args:
        link: open, subscribed to the topic of the job's status; not under the client id of the job's aggregators.
        job: the job.
        clock: seconds.
    """
    topic = aggregator_topic(job)
    link.publish(topic, encode(knock_of(job)))
    deadline, has_knocked, is_claimed = clock() + ANSWER_S, False, False
    while (left_s := deadline - clock()) > 0:
        message = link.receive(left_s)
        status = _status(message[1]) if message else None
        if status is None:
            continue
        if is_knock(status):
            has_knocked = True
        elif status.online and has_knocked:
            return True
        else:
            is_claimed = status.online
        if has_knocked and not is_claimed:
            return False
    return False if has_knocked else None


def is_of_another(payload: bytes, *, session: str) -> bool:
    """Whether a message on the topic of a job's status says that another session's process is online there."""
    status = _status(payload)
    return status is not None and status.online and status.session != session


def _status(payload: bytes) -> AggregatorStatus | None:
    try:
        found = decode(payload)
    except WireError:
        return None
    return found if isinstance(found, AggregatorStatus) else None
