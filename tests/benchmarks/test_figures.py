from fleetune.toolkit.benchmark import load

medians, ratio, table = (getattr(load("measuring.figures"), name) for name in ("medians", "ratio", "table"))

ROUNDS = [
    {"device": {"step_ms": 10.0, "peak_mb": 1.0}, "torch": {"step_ms": 20.0}},
    {"device": {"step_ms": 90.0, "peak_mb": 3.0}, "torch": {"step_ms": 100.0}},
    {"device": {"step_ms": 30.0, "peak_mb": 2.0}},
]


def test_medians_are_over_the_rounds_that_have_the_figure():
    assert medians(ROUNDS) == {"device_step_ms": 30.0, "device_peak_mb": 2.0, "torch_step_ms": 60.0}


def test_ratios_are_taken_within_a_round():
    """The ratio of the medians would be 30 / 60."""
    assert ratio(ROUNDS, "device", "torch") == 0.7
    assert ratio(ROUNDS, "device", "torch", what="peak_mb") is None
    assert ratio(ROUNDS, "device", "nobody") is None


def test_a_table_is_aligned_and_shows_what_is_missing():
    rows = [{"": "onnx", "step_ms": 1234.5, "ratio": 0.4567}, {"": "compile", "step_ms": None, "ratio": 12.0}]
    assert table(rows) == [
        "         step_ms  ratio",
        "onnx        1234  0.457",
        "compile        -     12",
    ]
    assert table([]) == []


def test_rows_of_other_columns_keep_theirs():
    assert table([{"": "a", "x": 1, "y": 2}, {"": "b", "y": 3, "z": 4}]) == [
        "   x  y  z",
        "a  1  2  -",
        "b  -  3  4",
    ]
