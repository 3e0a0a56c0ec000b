"""Which offer what the outbox holds came of: kept beside it, by task, and by round as release 0.1.0 kept it."""

from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.offer_keys import key_of_0_1
from fleetune.device_runtime.agent.outbox import Outbox
from fleetune.device_runtime.contracts.wire import Offer, default_task_id


class Made:
    """Facts of one device's outbox about one job."""

    def __init__(self, outbox: Outbox, identity: Identity) -> None:
        self._outbox, self._identity = outbox, identity

    def facts(self, task_id: str, key: str) -> dict[str, bytes]:
        """Facts to be kept with what was made of the offer with ``key``."""
        return {self._name(task_id): key.encode()}

    def key(self, task_id: str) -> str:
        """Key of the offer that a task's product came of; empty if nothing was made."""
        return (self._outbox.recall(self._name(task_id)) or b"").decode(errors="replace")

    def forget(self, task_id: str) -> None:
        """A task's product is settled: nobody asks any more what it came of."""
        self._outbox.forget(self._name(task_id))

    def came_of(self, offer: Offer, key: str) -> bool:
        """Whether what the outbox holds of a task came of this very offer, whose key is ``key``."""
        made = self._outbox.recall(self._name(offer.task_id))
        if made is None and offer.task_id == self.default_task_id(offer):
            made = self._outbox.recall(self._name(str(offer.round)))
            if made == key_of_0_1(offer).encode():
                self._outbox.remember(self._name(offer.task_id), made := key.encode())
        return made == key.encode()

    def has_round(self, number: int) -> bool:
        """Whether release 0.1.0 made the update of a round of this job here."""
        return self._outbox.recall(self._name(str(number))) is not None

    def default_task_id(self, offer: Offer) -> str:
        """Identity of a task that was offered without one."""
        return default_task_id(offer.role, offer.round, self._identity.device_id)

    def _name(self, task_id: str) -> str:
        return f"made/{self._identity.job}/{task_id}"
