"""What a device's codec remembers of one job and artifact: checksummed files, one for each unsettled round."""

import logging
import re
from collections.abc import Callable
from hashlib import sha256

import msgspec

from fleetune.device_runtime.arrays import Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.contracts.codecs.codec import as_kind
from fleetune.device_runtime.contracts.codecs.feedback import RESIDUAL
from fleetune.device_runtime.errors import ArtifactError
from fleetune.device_runtime.files import Files

log = logging.getLogger(__name__)

_OLD = re.compile(r"residual-(\d+)\.safetensors")


class CodecMemory:
    """The sender's memory by round; files of other jobs and artifacts in the same folder are left alone."""

    def __init__(self, files: Files, *, job: str, artifact: str) -> None:
        """Prepare; ``artifact`` is the SHA-256 of the manifest."""
        self._files, self._of = files, {"job": job, "artifact": artifact}
        self._key = sha256(f"{job}/{artifact}".encode()).hexdigest()[:16]
        self._name = re.compile(rf"memory-{self._key}-(\d+)\.safetensors")

    def before(self, round_number: int) -> Arrays:
        """What the newest update before this round left; a damaged file is set aside, and the one before it taken."""
        for number in reversed(self._rounds()):
            if number < round_number and (found := self._read(number)) is not None:
                return found
        return {}

    def keep(self, round_number: int, memory: Arrays) -> None:
        """Keep what the update of this round leaves; earlier memory stays until it is settled. StateError if it cannot."""
        if not memory and not any(number < round_number for number in self._rounds()):
            self._files.delete(self._file(round_number))
            return
        said = {**self._of, "sha256": sha256(to_bytes(memory)).hexdigest()}
        self._files.write(self._file(round_number), to_bytes(memory, metadata=said))

    def settle(self, round_number: int, *, accepted: bool) -> None:
        """The update was taken, or not: then its own memory is void, else that before it is.

        Later rounds belong to an earlier run of the job and go in both cases.
        """
        for number in self._rounds():
            if number > round_number or (number < round_number) == accepted:
                self._files.delete(self._file(number))

    def adopt(self, is_ours: Callable[[int], bool], *, like: Arrays) -> None:
        """Take over the residuals that version 0.1.0 kept without the name of a job; others are named and set aside.

        Args:
            is_ours: whether the update of a round was made for this job.
            like: the adapter's tensors; a residual of others is not of this artifact.
        """
        for name in self._files.names():
            if not (found := _OLD.fullmatch(name)):
                continue
            residual = _parsed(self._files.read(name) or b"")
            if residual is None or not is_ours(int(found[1])) or not _fits(residual, like):
                self._set_aside(name, f"not known to be of job {self._of['job']!r}")
                continue
            self.keep(int(found[1]), as_kind(RESIDUAL, residual))
            self._files.delete(name)

    def _read(self, number: int) -> Arrays | None:
        content = self._files.read(self._file(number)) or b""
        memory, said = _parsed(content), _metadata(content)
        if memory is not None and said == {**self._of, "sha256": sha256(to_bytes(memory)).hexdigest()}:
            return memory
        self._set_aside(self._file(number), "damaged; what it owed is not sent")
        return None

    def _set_aside(self, name: str, reason: str) -> None:
        log.warning("%s: %s; set aside as %s.aside", name, reason, name)
        self._files.write(f"{name}.aside", self._files.read(name) or b"")
        self._files.delete(name)

    def _rounds(self) -> list[int]:
        return sorted(int(found[1]) for name in self._files.names() if (found := self._name.fullmatch(name)))

    def _file(self, round_number: int) -> str:
        return f"memory-{self._key}-{round_number:06d}.safetensors"


def _parsed(content: bytes) -> Arrays | None:
    try:
        return parse_arrays(content)
    except ArtifactError:
        return None


def _metadata(content: bytes) -> object:
    """Of a safetensors file: 8 bytes of length, then a JSON header."""
    try:
        header = msgspec.json.decode(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return header.get("__metadata__") if isinstance(header, dict) else None


def _fits(residual: Arrays, like: Arrays) -> bool:
    return all(name in like and value.shape == like[name].shape for name, value in residual.items())
