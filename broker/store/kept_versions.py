"""Versions of a job's adapter, read beside an aggregator that may be at work, or after one that was stopped."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from fleetune.broker.store.blobs import read_checked, version_path
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.errors import ConfigError, StateError, some


class Kept(NamedTuple):
    """A version, the content of its adapter file, and the digest of the artifact that the job is about."""

    version: int
    content: bytes
    artifact: str


def read_version(folder: Path, version: int | None = None) -> Kept:
    """Read a version of the job in ``folder``, the newest by default; writes and locks nothing.

    Raises:
        ConfigError: no job is here, or it has no such version (those that there are, are named).
        StateError: ledger or file is damaged.
    """
    digests, artifact = _ledger(folder / LEDGER)
    if not digests:
        raise ConfigError(f"{folder}: its aggregator has made no version yet")
    wanted = max(digests) if version is None else version
    if not 0 <= wanted <= max(digests):
        raise ConfigError(f"{folder}: no version {wanted}; there are {min(digests)} to {max(digests)}")
    path = version_path(folder, wanted)
    if wanted not in digests or (0 < wanted < max(digests) and not path.exists()):
        kept = [version for version in sorted(digests) if version_path(folder, version).exists()]
        raise ConfigError(
            f"{folder}: version {wanted} is not kept any more (--keep-versions); there are {some([str(v) for v in kept])}"
        )
    return Kept(wanted, read_checked(path, digests[wanted]), artifact)


def _ledger(path: Path) -> tuple[dict[int, str], str]:
    """SHA-256 of each version's file, and of the artifact; ledgers of formats 1 and 2 say both alike."""
    if not path.is_file():
        raise ConfigError(f"{path.parent}: no job of an aggregator here (no {LEDGER}), so no versions")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as sql:
            (settings,) = sql.execute("SELECT settings FROM job").fetchone()
            return dict(sql.execute("SELECT version, sha256 FROM versions")), json.loads(settings)["artifact"]
    except (sqlite3.Error, TypeError, ValueError, KeyError) as exc:
        raise StateError(f"{path}: not a ledger, or damaged: {exc}") from exc
