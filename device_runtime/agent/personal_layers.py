"""The layers that a device keeps to itself (PTLS), round by round: what its next run starts from in place of the global ones."""

import logging

import numpy as np

from fleetune.device_runtime.agent.round_files import RoundFiles
from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.files import Files

log = logging.getLogger(__name__)


class PersonalLayers(RoundFiles):
    """Tensors of one job, artifact and device. What a refused update was trained with is void, as the update is."""

    def __init__(self, files: Files, *, job: str, artifact: str, device_id: str) -> None:
        """Prepare; ``artifact`` is the SHA-256 of the manifest."""
        of = {"job": job, "artifact": artifact, "device": device_id}
        super().__init__(files, "personal", of=of, loss="the layers in it start from the global ones")
        self._has_told = False

    def over(self, reference: Arrays, round_number: int) -> Arrays:
        """The adapter that a round starts from.

        Args:
            reference: the global version, float32 by tensor name; not written to.
            round_number: the round; what stayed here after the newest one before it is laid over.

        Returns:
            Own, writable copies.
        """
        own = self.before(round_number)
        if not own:
            self._tell_of_strangers()
        if wrong := [n for n in sorted(own) if n not in reference or not _is_alike(own[n], reference[n])]:
            log.warning("personal layers: %s is not of this model; all start from the global ones", wrong[0])
            own = {}
        return {name: np.array(value) for name, value in {**reference, **own}.items()}

    def _tell_of_strangers(self) -> None:
        if (others := self.strangers()) and not self._has_told:
            self._has_told = True
            log.warning("%s: personal layers of another job, artifact or device; not used here", others[0])


def _is_alike(value: Array, like: Array) -> bool:
    return value.shape == like.shape and value.dtype == like.dtype
