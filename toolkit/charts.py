"""Charts as SVG files, the same bytes every time: a benchmark's figures as bars, one panel per series; and any other figure."""

from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from fleetune.device_runtime.errors import ConfigError, lacking

_TITLE_COLUMNS = 60


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float, title: str = "") -> Any:
    """Make a matplotlib figure, in inches; ConfigError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as exc:
        raise lacking("a chart", "matplotlib", "charts") from exc
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fleetune"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure


def save(figure: Any, path: Path) -> Path:
    """Write a figure as SVG; ConfigError if it cannot be."""
    try:
        figure.savefig(path, metadata={"Date": None})
    except OSError as exc:
        raise ConfigError(f"{path}: the chart cannot be written: {exc.strerror}") from exc
    return path


def draw(path: Path, title: str, chart: dict[str, Any]) -> None:
    """Write ``path``.

    Args:
        path: SVG file to write.
        title: above the bars.
        chart: ``labels``, and ``series``: a number for each label, by what the numbers are.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    labels, series = chart["labels"], chart["series"]
    title = fill(title, _TITLE_COLUMNS * len(series))
    figure = new_figure(4.2 * len(series) + 1.6, 0.42 * len(labels) + 1.4, title)
    for axes, (name, values) in zip(
        figure.subplots(1, len(series), squeeze=False, sharey=True)[0], series.items(), strict=True
    ):
        bars = axes.barh(labels, values, color="#3b6ea5")
        axes.bar_label(bars, [_shown(value) for value in values], padding=3)
        axes.set_xlabel(name)
        axes.margins(x=0.2)
    axes.invert_yaxis()
    save(figure, path)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
