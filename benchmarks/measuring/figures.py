"""What interleaved repeats say: medians, ratios taken pair by pair, and a table.

A round is what one repeat measured: figures by name, by who was measured. Somebody missing from a round was not measured.
"""

import statistics
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

Round = dict[str, dict[str, float]]


def medians(rounds: Sequence[Round], *, digits: int = 3) -> dict[str, float]:
    """``WHO_WHAT`` for everybody and every figure, over the rounds that have it."""
    found: dict[str, list[float]] = {}
    for measured in rounds:
        for who, figures in measured.items():
            for what, value in figures.items():
                found.setdefault(f"{who}_{what}", []).append(value)
    return {name: round(statistics.median(values), digits) for name, values in found.items()}


def ratio(rounds: Sequence[Round], over: str, under: str, *, what: str = "step_ms") -> float | None:
    """Median over the rounds of one's figure over another's in the same round; None if no round has both."""
    figures = [(r.get(over, {}).get(what), r.get(under, {}).get(what)) for r in rounds]
    pairs = [a / b for a, b in figures if a is not None and b]
    return round(statistics.median(pairs), 3) if pairs else None


def chart_of(label: str, rows: Iterable[dict[str, Any]], *series: str) -> dict[str, Any]:
    """What :func:`fleetune.toolkit.charts.draw` draws: the rows' ``label`` under bars of each of ``series``."""
    rows = list(rows)
    labels = [str(row[label]) for row in rows]
    return {"labels": labels, "series": {name: [float(row[name]) for row in rows] for name in series}}


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Rows as lines of aligned columns, one for each key that any of them has; None, and what a row lacks, is a dash."""
    rows = list(rows)
    if not rows:
        return []
    names = [*dict.fromkeys(chain.from_iterable(rows))]
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [_line(line, widths) for line in cells]


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
