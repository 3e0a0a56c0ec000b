"""A chart is an SVG with a panel per series, the same bytes every time."""

from pathlib import Path

import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.benchmark import load
from fleetune.toolkit.charts import draw

chart_of = load("measuring.figures").chart_of

ROWS = [{"plan": "resident", "ms": 10.0, "mb": 300}, {"plan": "streamed", "ms": 11.5, "mb": 120}]


def test_it_shows_every_label_and_series_and_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / f"{name}.svg", "What streaming costs", chart_of("plan", ROWS, "ms", "mb"))
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes()
    for words in (b"What streaming costs", b"resident", b"streamed", b"11.5", b"120", b"<!-- mb -->"):
        assert words in content


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the chart cannot be written: No such file or directory"):
        draw(tmp_path / "none" / "a.svg", "title", chart_of("plan", ROWS, "ms"))
