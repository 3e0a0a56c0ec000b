"""The table of docs/architectures.md: written by the slow tests when asked, compared by them otherwise."""

import os
import re

from paths import ROOT

PAGE = ROOT / "docs" / "architectures.md"
NOT_MEASURED = "not measured"
WRITE = "FLEETUNE_WRITE_DOCS"
_HEADER = (
    "| architecture | task | backend | largest relative error, or why it is refused |\n|---|---|---|---|\n"
)
_ROW = re.compile(r"^\| (\S+) \| (\S+) \| (\S+) \| (.*) \|$", re.MULTILINE)
Key = tuple[str, str, str]


def read_table() -> dict[Key, str]:
    """Outcome by (architecture, task, backend)."""
    return {(a, t, b): outcome for a, t, b, outcome in _ROW.findall(PAGE.read_text()) if a != "architecture"}


def record(key: Key, outcome: str) -> None:
    """Write one row, if the environment asks for it."""
    if os.environ.get(WRITE):
        write_table(read_table() | {key: outcome})


def write_table(rows: dict[Key, str]) -> None:
    """Put ``rows`` in the place of the page's table; the words around it stay."""
    before = PAGE.read_text().split("| architecture |")[0]
    lines = [f"| {a} | {t} | {b} | {outcome} |\n" for (a, t, b), outcome in rows.items()]
    PAGE.write_text(before + _HEADER + "".join(lines))
