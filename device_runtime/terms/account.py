"""What a device's data has spent: the steps that have hidden its samples, in all rounds and jobs, and their epsilon.

Steps are put down before the first of them is taken, synced. They count whether or not anything of them leaves. The file that
says so is not set aside when it is damaged: what it said is not known then, and no more is spent.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import msgspec

from fleetune.device_runtime.contracts.accounting import Steps, epsilon_of_steps
from fleetune.device_runtime.contracts.fields import COUNT_MAX
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import DiskFiles, Files, doing, locked
from fleetune.device_runtime.prepared import prepared

FILE, LOCK = "spent.json", "spent.lock"


class Spent(msgspec.Struct, frozen=True):
    """All steps so far, by kind."""

    steps: tuple[Steps, ...] = ()
    last: str = ""
    """Of the work that was put down last: it counts once, however often it is taken up again."""
    sha256: str = ""
    """Of the rest."""


class Account:
    """One device's, or that of several on the same data, which share a folder."""

    def __init__(self, files: Files, *, shared: Path | None = None) -> None:
        """Prepare; nothing is read yet.

        Args:
            files: the device's own.
            shared: a folder in their place, made when something is spent.
        """
        self._files, self._shared = files, shared

    def read(self) -> Spent:
        """Return what is spent.

        Raises:
            ConfigError: the file is damaged.
            StateError: it cannot be read.
        """
        content = self._files.read(FILE) if self._shared is None else _content(self._shared / FILE)
        return _parsed(content) if content is not None else Spent()

    def with_more(self, steps: Steps, key: str) -> Spent:
        """Return what is spent with these steps of the work ``key``; raises as :meth:`read`."""
        before = self.read()
        if key == before.last:
            return before
        kinds = {(kind.noise, kind.rate): kind.count for kind in before.steps}
        kind = steps.noise, steps.rate
        kinds[kind] = min(COUNT_MAX, kinds.get(kind, 0) + steps.count)
        return Spent(tuple(Steps(*kind, count) for kind, count in kinds.items()), key)

    def put_down(self, steps: Steps, key: str, *, most: float, delta: float) -> None:
        """Spend these steps of the work ``key``, synced, or nothing.

        Raises:
            ConfigError: as :func:`check_spent`, or as :meth:`read`.
            StateError: it cannot be written.
        """
        with self._alone() as files:
            spent = self.with_more(steps, key)
            check_spent(spent, most=most, delta=delta)
            files.write(FILE, msgspec.json.encode(_sealed(spent)))

    @contextmanager
    def _alone(self) -> Iterator[Files]:
        """Have the account for this process."""
        if self._shared is None:
            yield self._files
            return
        with doing("written", self._shared):
            self._shared.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = locked(self._shared / LOCK, wait=True)
        with held:
            yield DiskFiles(self._shared)


def check_spent(spent: Spent, *, most: float, delta: float) -> float:
    """Return its epsilon at ``delta``.

    Raises:
        ConfigError: it is more than ``most`` (0: any), or dp-accounting is not installed.
    """
    found = epsilon_of_steps(spent.steps, delta)
    if most and not found <= most:
        raise ConfigError(
            f"this device's owner does not allow it: most_epsilon: {found:,.4g} of its data would be spent, "
            f"{most:,.15g} at most (delta {delta:g})"
        )
    return found


def _content(path: Path) -> bytes | None:
    with doing("read", path):
        return path.read_bytes() if path.is_file() else None


def _sealed(spent: Spent) -> Spent:
    whole = msgspec.structs.replace(spent, sha256="")
    return msgspec.structs.replace(whole, sha256=sha256(msgspec.json.encode(whole)).hexdigest())


def _parsed(content: bytes) -> Spent:
    try:
        found = msgspec.json.decode(content, type=prepared(Spent))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{FILE}: damaged, {_UNKNOWN}: {exc}") from exc
    if _sealed(found) != found:
        raise ConfigError(f"{FILE}: damaged, {_UNKNOWN}: its checksum differs")
    return found


_UNKNOWN = "and what this device's data has spent is not known"
