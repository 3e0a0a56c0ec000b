"""What a device's codec remembers of one job and artifact, round by round."""

import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.agent.round_files import RoundFiles, parsed, set_aside
from fleetune.device_runtime.arrays import Arrays, Indices
from fleetune.device_runtime.contracts.codecs.codec import as_kind, of_kind
from fleetune.device_runtime.contracts.codecs.feedback import RESIDUAL
from fleetune.device_runtime.files import Files

Places = Mapping[str, tuple[slice | Indices, ...] | NDArray[np.bool_]]
"""Index by tensor of what travels of it; a tensor that travels whole is absent."""

_OLD = re.compile(r"residual-(\d+)\.safetensors")


class CodecMemory(RoundFiles):
    """The sender's memory by round."""

    def __init__(self, files: Files, *, job: str, artifact: str) -> None:
        """Prepare; ``artifact`` is the SHA-256 of the manifest."""
        super().__init__(
            files, "memory", of={"job": job, "artifact": artifact}, loss="what it owed is not sent"
        )

    def adopt(self, is_ours: Callable[[int], bool], *, like: Arrays) -> None:
        """Take over the residuals that version 0.1.0 kept without the name of a job; others are named and set aside.

        Args:
            is_ours: whether the update of a round was made for this job.
            like: the adapter's tensors; a residual of others is not of this artifact.
        """
        for name in self._files.names():
            if not (found := _OLD.fullmatch(name)):
                continue
            residual = parsed(self._files.read(name) or b"")
            if residual is None or not is_ours(int(found[1])) or not _fits(residual, like):
                set_aside(self._files, name, f"not known to be of job {self._of['job']!r}")
                continue
            self.keep(int(found[1]), as_kind(RESIDUAL, residual))
            self._files.delete(name)


def taken(memory: Arrays, whole: Arrays, places: Places) -> Arrays:
    """Return a codec's memory for an update of ``places`` alone: of what is owed of a whole tensor, the part that travels."""
    found = dict(memory)
    for name, owed in of_kind(RESIDUAL, memory).items():
        if name in places and owed.shape == whole[name].shape:
            part = owed[places[name]]
            del found[key := f"{RESIDUAL}/{name}"]
            found |= {key: part} if part.any() else {}
    return found


def put_back(memory: Arrays, before: Arrays, whole: Arrays, places: Places) -> Arrays:
    """Return a codec's memory with what is owed of ``places`` among what was owed ``before`` of each whole tensor."""
    owed, earlier, found = of_kind(RESIDUAL, memory), of_kind(RESIDUAL, before), dict(memory)
    for name, place in places.items():
        total = np.zeros(whole[name].shape)
        if name in earlier and earlier[name].shape == total.shape:
            total += earlier[name].astype(np.float64)
        total[place] = owed.get(name, 0.0)
        found.pop(key := f"{RESIDUAL}/{name}", None)
        found |= {key: total} if total.any() else {}
    return found


def _fits(residual: Arrays, like: Arrays) -> bool:
    return all(name in like and value.shape == like[name].shape for name, value in residual.items())
