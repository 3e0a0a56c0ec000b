"""Which updates are admitted: a pure function of the open round, the updates accepted so far, and what is announced."""

from collections.abc import Container, Sequence
from hashlib import sha256

from fleetune.broker.rounds.open_round import OpenRound
from fleetune.device_runtime.contracts.fields import COUNT_MAX
from fleetune.device_runtime.contracts.wire import UpdateReady, encode

_SHOWN_CHARS = 120


def refusal(
    update: UpdateReady,
    open_round: OpenRound | None,
    accepted: Container[str],
    *,
    newest_round: int,
    num_classes: int = 0,
) -> str:
    """Say why an update is refused; empty if its payload has to be seen.

    Args:
        update: as announced, its ``task_id`` filled in.
        open_round: the round that is open, if one is.
        accepted: identities of the tasks that have an accepted update.
        newest_round: number of the open round, or of the last one closed.
        num_classes: of the job; 0 if that is not known.
    """
    number, device = update.round, update.device_id
    if not 1 <= number <= newest_round:
        return f"round {number} is unknown; the newest is {newest_round}"
    if update.task_id in accepted:
        return f"another update of this device is accepted in round {number}"
    if open_round is None or number != open_round.number:
        return f"round {number} is closed"
    task = open_round.tasks.get(device)
    if task is None:
        return f"device {device!r} was not asked in round {number}"
    if update.task_id != task.task_id:
        return f"it answers task {update.task_id[:_SHOWN_CHARS]!r}; this device's is {task.task_id!r}"
    if update.version != task.version:
        return f"it starts from version {update.version}; round {number} starts from {task.version}"
    if update.codec != task.work.codec:
        return f"its codec is {update.codec[:_SHOWN_CHARS]!r}; {task.work.codec!r} was asked for"
    if task.work.histogram and (wrong := _histogram_problem(update.histogram, num_classes)):
        return wrong
    return open_round.refusal(device, identity(update))


def _histogram_problem(histogram: Sequence[int], num_classes: int) -> str:
    """Say what is wrong with a label histogram that was asked for; nothing if there is none: its owner may not allow it."""
    if histogram and num_classes and len(histogram) != num_classes:
        return f"its histogram has {len(histogram)} classes; this job has {num_classes}"
    if strange := [count for count in histogram if not 0 <= count <= COUNT_MAX]:
        return f"its histogram counts {strange[0]} samples of a class; expected 0 to {COUNT_MAX}"
    return ""


def identity(update: UpdateReady) -> bytes:
    """Digest of all of an announcement: one damaged announcement must not condemn the good one that follows."""
    return sha256(encode(update)).digest()
