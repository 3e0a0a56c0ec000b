"""What a device keeps between starts: an adapter version, checkpoints of local work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load

from fleetune.device_runtime.arrays import Arrays, write_atomically
from fleetune.device_runtime.errors import StateError, WireError


class StateFolder:
    """One device's folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._adapter = folder / "adapter.safetensors"

    def adapter(self, digest: str) -> bytes | None:
        """Content of the adapter file with this SHA-256, if it is the one kept."""
        content = self._adapter.read_bytes() if self._adapter.is_file() else b""
        return content if sha256(content).hexdigest() == digest else None

    def newest_adapter(self) -> bytes:
        """Content of the adapter file kept, whichever it is; empty if there is none."""
        return self._adapter.read_bytes() if self._adapter.is_file() else b""

    def keep_adapter(self, content: bytes) -> None:
        """Keep an adapter in place of the one before; StateError if it cannot be written."""
        with self._writing():
            write_atomically(self._adapter, content)

    def keep_checkpoint(self, key: str, save: Callable[[Path], None]) -> None:
        """Let ``save`` write a checkpoint of the work ``key``; StateError if it cannot be written."""
        with self._writing():
            save(self.checkpoint(key))

    def checkpoint(self, key: str) -> Path:
        """Where the checkpoint of the work ``key`` is, or will be."""
        return self._folder / f"work-{key}.safetensors"

    def forget_checkpoints(self, *, but: str = "") -> None:
        """Delete the checkpoints of all work but ``but``."""
        for path in self._folder.glob("work-*.safetensors"):
            if path != self.checkpoint(but):
                path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StateError(f"{self._folder}: cannot be written: {exc.strerror or exc}") from exc


def parse_adapter(content: bytes, like: Arrays) -> Arrays:
    """Adapter file to tensors.

    Raises:
        WireError: not a safetensors file, or not the names, shapes and dtypes of ``like`` (all differences listed).
    """
    try:
        arrays: Arrays = dict(load(content))
    except (SafetensorError, ValueError, KeyError) as exc:
        raise WireError(f"adapter is not a safetensors file: {exc}") from exc
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
