"""What a device keeps between starts: an adapter version, checkpoints of local work."""

import re
from collections.abc import Callable
from hashlib import sha256

from fleetune.device_runtime.arrays import Arrays, parse_arrays
from fleetune.device_runtime.contracts.thresholds import blank_thresholds, thresholds_of
from fleetune.device_runtime.errors import ArtifactError, WireError
from fleetune.device_runtime.files import Files, PathUser

_ADAPTER = "adapter.safetensors"
_CHECKPOINT = re.compile(r"work-(.+)\.safetensors")


class StateFolder:
    """One device's files."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def adapter(self, digest: str) -> bytes | None:
        """Content of the adapter file with this SHA-256, if it is the one kept."""
        content = self._files.read(_ADAPTER)
        return content if content and sha256(content).hexdigest() == digest else None

    def newest_adapter(self) -> bytes:
        """Content of the adapter file kept, whichever it is; empty if there is none."""
        return self._files.read(_ADAPTER) or b""

    def keep_adapter(self, content: bytes) -> None:
        """Keep an adapter in place of the one before; StateError if it cannot be written."""
        self._files.write(_ADAPTER, content)

    def keep_checkpoint(self, key: str, save: PathUser) -> None:
        """Let ``save`` write a checkpoint of the work ``key``; StateError if it cannot be written."""
        self._files.save(_checkpoint_name(key), save)

    def restore(self, key: str, load: PathUser) -> bool:
        """Let ``load`` read the checkpoint of the work ``key``; False if there is none. What ``load`` raises passes."""
        return self._files.load(_checkpoint_name(key), load)

    def rename_checkpoint(self, old: Callable[[], str], key: str) -> None:
        """Keep a checkpoint of the work ``old()``, if there is one, as one of the work ``key``."""
        if not (keys := self._checkpoints()) or (named := old()) not in keys:
            return
        if (content := self._files.read(_checkpoint_name(named))) is not None:
            self._files.write(_checkpoint_name(key), content)
            self._files.delete(_checkpoint_name(named))

    def forget_checkpoints(self, *, but: str = "") -> None:
        """Delete the checkpoints of all work but ``but``."""
        for key in self._checkpoints():
            if key != but:
                self._files.delete(_checkpoint_name(key))

    def _checkpoints(self) -> list[str]:
        """What there are checkpoints of."""
        return [found[1] for name in self._files.names() if (found := _CHECKPOINT.fullmatch(name))]


def _checkpoint_name(key: str) -> str:
    return f"work-{key}.safetensors"


def parse_adapter(content: bytes, like: Arrays) -> Arrays:
    """Adapter file to tensors.

    Raises:
        WireError: not a safetensors file, or not the names, shapes and dtypes of ``like`` (all differences listed); thresholds
            may be beside them.
    """
    try:
        arrays = parse_arrays(content)
    except ArtifactError as exc:
        raise WireError(f"adapter cannot be read: {exc}") from exc
    if thresholds_of(arrays):
        like = {**like, **blank_thresholds(like)}
    problems = [f"{name}: unexpected" for name in sorted(arrays.keys() - like.keys())]
    problems += [f"{name}: missing" for name in sorted(like.keys() - arrays.keys())]
    for name in sorted(arrays.keys() & like.keys()):
        found, wanted = _form(arrays, name), _form(like, name)
        problems += [f"{name}: {found}, expected {wanted}"] if found != wanted else []
    if problems:
        raise WireError("adapter does not fit: " + "; ".join(problems[:8]))
    return arrays


def _form(arrays: Arrays, name: str) -> str:
    return f"{arrays[name].dtype}{list(arrays[name].shape)}"
