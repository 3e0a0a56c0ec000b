"""A comparison as people read it: a table for each target."""

from collections.abc import Callable, Iterator, Sequence

from fleetune.toolkit.live import size
from fleetune.toolkit.simulation.compare import Arm, Comparison, Reached, Spread

_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "time_s": ("time", lambda value: duration(value)),
    "compute_s": ("compute", lambda value: duration(value)),
    "bytes_up": ("up", size),
    "bytes_down": ("down", size),
    "bytes": ("both ways", size),
    "peak_mb": ("peak", lambda value: size(1e6 * value)),
    "peak_mb_mean": ("mean peak", lambda value: size(1e6 * value)),
    "energy_j": ("energy", lambda value: f"{value / 3600:.3g} Wh"),
}


def show_comparison(comparison: Comparison) -> Iterator[str]:
    """Yield the lines: for each target a table, each cost as ``mean ±spread (ratio to the reference)``; then notes and files."""
    first = comparison.arms[0]
    for place, target in enumerate(first.targets):
        yield (
            f"to {100 * target.share:g} % of the final accuracy of {comparison.of}, {target.accuracy:.3f}; "
            f"in brackets the median ratio to {comparison.of}"
        )
        yield from _aligned([_HEADER, *(_row(arm, arm.targets[place]) for arm in comparison.arms)])
        yield ""
    yield from (f"note: {note}" for note in comparison.notes)
    yield from comparison.charts


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it: ``1.5 h``."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


_HEADER = ["arm", "seeds", "final", "reached", *(title for title, _ in _COLUMNS.values())]
_IN_EVERY_ROW = 4
"""Columns that an arm has whether it reached the target or not."""


def _row(arm: Arm, found: Reached) -> list[str]:
    spread = f" ±{arm.final.std:.3f}" if found.seeds > 1 else ""
    final = f"{arm.final.mean:.3f}{spread}"
    row = [arm.name, str(found.seeds), final, f"{found.reached} of {found.seeds}"]
    if found.reached < found.seeds:
        return [*row, f"not reached, at best {found.best:.3f}"]
    return [*row, *(_cost(found, name, form) for name, (_, form) in _COLUMNS.items())]


def _cost(found: Reached, name: str, form: Callable[[float], str]) -> str:
    cost, ratio = found.costs[name], found.ratios[name]
    shown = _spread(cost, form) if cost else "-"
    return f"{shown} ({ratio:.2f})" if ratio is not None else shown


def _spread(figure: Spread, form: Callable[[float], str]) -> str:
    share = figure.std / figure.mean if figure.mean else 0.0
    return form(figure.mean) + (f" ±{100 * share:.0f} %" if figure.seeds > 1 else "")


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns; the last words of a shorter row, an arm that did not reach the target, set no width."""
    full = len(rows[0])
    widths = [max(len(row[i]) for row in rows if len(row) == full or i < _IN_EVERY_ROW) for i in range(full)]
    for row in rows:
        yield "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=False)).rstrip()
