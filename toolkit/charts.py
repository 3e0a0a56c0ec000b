"""A benchmark's figures as bars, one panel per series, in an SVG file."""

from pathlib import Path
from textwrap import fill
from typing import Any

from fleetune.device_runtime.errors import ConfigError

_TITLE_COLUMNS = 60


def draw(path: Path, title: str, chart: dict[str, Any]) -> None:
    """Write ``path``.

    Args:
        path: SVG file to write.
        title: above the bars.
        chart: ``labels``, and ``series``: a number for each label, by what the numbers are.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as exc:
        raise ConfigError("a chart needs matplotlib: pip install 'fleetune[dev]'") from exc
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fleetune"
    from matplotlib.figure import Figure

    labels, series = chart["labels"], chart["series"]
    figure = Figure(figsize=(4.2 * len(series) + 1.6, 0.42 * len(labels) + 1.4), layout="constrained")
    figure.suptitle(fill(title, _TITLE_COLUMNS * len(series)), fontsize="medium")
    for axes, (name, values) in zip(
        figure.subplots(1, len(series), squeeze=False, sharey=True)[0], series.items(), strict=True
    ):
        bars = axes.barh(labels, values, color="#3b6ea5")
        axes.bar_label(bars, [_shown(value) for value in values], padding=3)
        axes.set_xlabel(name)
        axes.margins(x=0.2)
    axes.invert_yaxis()
    try:
        figure.savefig(path, metadata={"Date": None})
    except OSError as exc:
        raise ConfigError(f"{path}: the chart cannot be written: {exc.strerror}") from exc


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
