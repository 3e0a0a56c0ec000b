import io

import pytest
from rich.console import Console

from fleetune.toolkit.commands.fields import line_of, show_fields


@pytest.mark.parametrize(
    ("name", "value", "label", "text"),
    [
        ("base_bytes", 90_879_488, "base", "90.9 MB"),
        ("link_bytes_sent", 1_234, "link sent", "1.2 kB"),
        ("peak_rss_mb", 482.625, "peak memory", "506.1 MB"),
        ("step_ms_median", 66.4, "step median", "66 ms"),
        ("wall_s", 9.16, "wall", "9.2 s"),
        ("seconds", 12.0, "time", "12.0 s"),
        ("num_layers", 6, "layers", "6"),
        ("max_length", 512, "max length", "512"),
        ("loss", 0.123456789, "loss", "0.123457"),
        ("reason", "the job is over", "reason", "the job is over"),
        ("licences", {"MiniLM": "Apache-2.0", "data": "MIT"}, "licences", "MiniLM: Apache-2.0; data: MIT"),
        ("dropped", [1, 3], "dropped", "1, 3"),
    ],
)
def test_a_field_is_shown_with_its_unit(name, value, label, text):
    assert line_of(name, value) == (label, text)


def test_what_is_long_or_nested_or_missing_is_left_out():
    history, losses = [{"round": 0}, {"round": 1}], [0.5] * 9
    shown = io.StringIO()
    fields = {"rounds": 2, "history": history, "losses": losses, "accuracy": None}
    show_fields(Console(file=shown), fields)
    assert shown.getvalue() == "rounds  2\n"
