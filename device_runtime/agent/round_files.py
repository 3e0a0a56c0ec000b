"""Tensors that a device keeps from round to round: one checksummed file for each round whose update is not settled."""

import logging
import re
from collections.abc import Mapping
from hashlib import sha256

import msgspec

from fleetune.device_runtime.arrays import Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.errors import ArtifactError
from fleetune.device_runtime.files import Files

log = logging.getLogger(__name__)


class RoundFiles:
    """Tensors of one kind by round; files of other owners in the same folder are left alone."""

    def __init__(self, files: Files, kind: str, *, of: Mapping[str, str], loss: str) -> None:
        """Prepare.

        Args:
            files: where they lie.
            kind: begins their names.
            of: whose they are: a job, say, and an artifact.
            loss: what it means that one is damaged, for the log.
        """
        self._files, self._kind, self._of, self._loss = files, kind, dict(of), loss
        self._key = sha256("/".join(self._of.values()).encode()).hexdigest()[:16]
        self._name = re.compile(rf"{kind}-{self._key}-(\d+)\.safetensors")

    def before(self, round_number: int) -> Arrays:
        """What the newest round before this one left; a damaged file is set aside, and the one before it taken."""
        for number in reversed(self._rounds()):
            if number < round_number and (found := self._read(number)) is not None:
                return found
        return {}

    def keep(self, round_number: int, tensors: Arrays) -> None:
        """Keep what a round leaves; what earlier ones left stays until it is settled. StateError if it cannot be written."""
        if not tensors and not any(number < round_number for number in self._rounds()):
            self._files.delete(self._file(round_number))
            return
        said = {**self._of, "sha256": sha256(to_bytes(tensors)).hexdigest()}
        self._files.write(self._file(round_number), to_bytes(tensors, metadata=said))

    def settle(self, round_number: int, *, accepted: bool, newest: int = -1) -> None:
        """The update of a round was taken, or not: then what that round left is void, else what was before it is.

        Verdicts may be late: what later rounds left stays up to ``newest``, the last round of this run of the job. What is
        beyond belongs to an earlier run and goes in both cases.
        """
        last = max(round_number, newest)
        for number in self._rounds():
            is_void = number < round_number if accepted else number == round_number
            if is_void or number > last:
                self._files.delete(self._file(number))

    def strangers(self) -> list[str]:
        """Names of the files of this kind that are of other owners."""
        ours = re.compile(rf"{self._kind}-.+\.safetensors")
        return [n for n in self._files.names() if ours.fullmatch(n) and not self._name.fullmatch(n)]

    def _read(self, number: int) -> Arrays | None:
        content = self._files.read(self._file(number)) or b""
        tensors, said = parsed(content), _metadata(content)
        if tensors is not None and said == {**self._of, "sha256": sha256(to_bytes(tensors)).hexdigest()}:
            return tensors
        set_aside(self._files, self._file(number), f"damaged; {self._loss}")
        return None

    def _rounds(self) -> list[int]:
        return sorted(int(found[1]) for name in self._files.names() if (found := self._name.fullmatch(name)))

    def _file(self, round_number: int) -> str:
        return f"{self._kind}-{self._key}-{round_number:06d}.safetensors"


def set_aside(files: Files, name: str, reason: str) -> None:
    """Rename a file that is not used, and say why."""
    log.warning("%s: %s; set aside as %s.aside", name, reason, name)
    files.write(f"{name}.aside", files.read(name) or b"")
    files.delete(name)


def parsed(content: bytes) -> Arrays | None:
    """Tensors of a safetensors file; None if it is none."""
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
