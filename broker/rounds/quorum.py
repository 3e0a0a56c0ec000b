"""How many devices a round needs: fewer where some that are here may not be asked."""

from functools import partial

from fleetune.broker.jobs.settings import MASKS, Settings
from fleetune.broker.methods.selection import Roster
from fleetune.broker.rounds.open_round import OpenRound, Standing
from fleetune.broker.rounds.quarantine import Quarantine


class Quorum:
    """Of one job, whose ``roster`` and ``quarantine`` it reads."""

    def __init__(self, settings: Settings, roster: Roster, quarantine: Quarantine) -> None:
        self._settings, self._roster, self._quarantine = settings, roster, quarantine

    def num_fit(self, number: int) -> int:
        """How many devices are here that may be asked in a round."""
        return len(self._roster) - len(self._left_out(number))

    def least(self, number: int, *, deadline_of: OpenRound | None = None) -> int:
        """How many updates a round needs; at its deadline, ``deadline_of``, those whose update was refused are excused too."""
        return self.less_excused(number, self._settings.min_clients, deadline_of)

    def less_excused(self, number: int, wanted: int, deadline_of: OpenRound | None = None) -> int:
        """How many of the devices wanted it does not go without for being here and not fit: always more than half.

        Nobody is excused as long as there are enough others, and nobody under masks: a sum of fewer hides less.
        """
        if self._settings.secure == MASKS:
            return wanted
        unfit = self._left_out(number)
        if deadline_of:
            refused = self._quarantine.refused(number)
            unfit |= {d for d in refused if d in self._roster and not _has_accepted(deadline_of, d)}
        lacking = max(0, wanted - (len(self._roster) - len(unfit)))
        return wanted - min(len(unfit), lacking, (wanted - 1) // 2)

    def _left_out(self, number: int) -> set[str]:
        """Devices here that are not to be asked in a round."""
        held = filter(partial(self._quarantine.holds, number=number), self._quarantine.until(number))
        return {device for device in held if device in self._roster}


def _has_accepted(open_round: OpenRound, device_id: str) -> bool:
    return open_round.standing(device_id) is Standing.ACCEPTED
