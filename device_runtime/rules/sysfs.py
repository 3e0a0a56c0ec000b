"""Small text files of ``/sys`` and ``/proc``, read without ever raising: they vanish, fail and lie."""

import math
from pathlib import Path


def read_text(path: Path) -> str:
    """Content without surrounding space; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def number_of(text: str) -> float:
    """A number, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def list_folders(parent: Path, pattern: str) -> list[Path]:
    """What matches in ``parent``, sorted; nothing if it cannot be read."""
    try:
        return sorted(parent.glob(pattern))
    except OSError:
        return []
