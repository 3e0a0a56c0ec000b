"""Where a merge is written: nothing that is read, or that is not an earlier merge's, is written over."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetune.device_runtime.contracts.provenance import PROVENANCE
from fleetune.device_runtime.contracts.run_file import ADAPTER, LEDGER, RUN
from fleetune.device_runtime.errors import ConfigError, ExportError, some
from fleetune.device_runtime.files import give_usual_modes, replacing


def refuse_overlap(out: Path, *read: Path) -> None:
    """Raise ConfigError if to write ``out`` is to write over, or around, what is read."""
    target = out.resolve()
    for path in read:
        if path.exists() and (target == path.resolve() or target in path.resolve().parents):
            raise ConfigError(f"{out}: holds what is merged, {path}; choose another --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Make a folder beside ``out`` that takes its place when all went well.

    Raises:
        ConfigError: ``out`` is no folder, or holds what is not a merge's.
        ExportError: it cannot be written.
    """
    _check_replaceable(out)
    try:
        with replacing(out) as part:
            yield part
            give_usual_modes(part)
            _check_replaceable(out, made={path.name for path in part.iterdir()})
    except OSError as exc:
        raise ExportError(f"{out}: cannot be written: {exc.strerror or exc}") from exc


def _check_replaceable(out: Path, *, made: set[str] | None = None) -> None:
    """An earlier merge may be replaced, where nothing else is in the folder; ``made``: the names that are to be there."""
    if not out.exists():
        return
    if out.name == ADAPTER and any((out.parent / name).exists() for name in (RUN, LEDGER)):
        raise ConfigError(f"{out}: is the adapter of a run; choose another --out")
    found = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if not found or (PROVENANCE in found and (made is None or found <= made)):
        return
    others = sorted(found - (made or set())) if PROVENANCE in found else sorted(found)
    raise ConfigError(
        f"{out}: exists and is not an earlier merge ({some(others, at_most=3)}); choose another --out"
    )
