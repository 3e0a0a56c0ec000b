"""What the masks of an open round mean for who is waited for, and for whether it can be closed at all."""

import logging

from fleetune.broker.rounds.masked_round import SHARES, UPDATES, MaskedRound
from fleetune.broker.rounds.open_round import OpenRound, Standing
from fleetune.broker.tasks import listed
from fleetune.device_runtime.contracts.wire import UpdateReady

log = logging.getLogger(__name__)


def update_refusal(masks: MaskedRound, update: UpdateReady) -> str:
    """Say why an update that answers a task cannot be in the sum; empty if it can."""
    if masks.phase != UPDATES:
        return "its round takes no masked updates now"
    return "" if masks.takes_part(update.device_id) else "it is not of those who mask together"


def leave_out_slow(open_round: OpenRound, masks: MaskedRound) -> None:
    """Wait no more for devices that can take no part."""
    if slow := [device for device in open_round.of(Standing.PENDING) if masks.lost(device)]:
        log.warning("round %d: goes on without %s", open_round.number, listed(slow))
    for device in slow:
        open_round.stand(device, Standing.REFUSED)


def is_hopeless(open_round: OpenRound, masks: MaskedRound, least: int) -> bool:
    """Whether fewer than ``least`` are left of those who mask together."""
    left = open_round.count(Standing.PENDING) + open_round.count(Standing.ACCEPTED)
    return masks.phase in (SHARES, UPDATES) and left < least


def why_anew(masks: MaskedRound) -> str:
    """Say why a sum under masks has to begin anew."""
    if unfit := masks.unfit():
        return f"the shares of {listed(unfit)} do not fit their keys"
    return "too few devices are left to take the masks off"
