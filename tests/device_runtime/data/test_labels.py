import pytest

from fleetune.device_runtime.data.labels import class_reader
from fleetune.device_runtime.data.rows import Source
from fleetune.device_runtime.errors import DataError

STARS = ("1", "2", "3", "4", "5")
WORDS = ("off", "on", "dim")
LINE = Source(None, 7)


@pytest.mark.parametrize(
    ("names", "label", "index"),
    [
        (WORDS, "on", 1),
        (WORDS, " on\t", 1),
        (WORDS, "\ufeffon", 1),
        (WORDS, 1, 1),
        (WORDS, 1.0, 1),
        (WORDS, "1", 1),
        (WORDS, "01", 1),
        (WORDS, " 1.0 ", 1),
        (STARS, 1, 0),
        (STARS, "1", 0),
        (STARS, 1.0, 0),
        (STARS, "1.0", 0),
        (STARS, "05", 4),
        (("10", "20", "1"), 1, 2),
        (("0.5", "1.0"), 1, 1),
        (("01", "1"), "1", 1),
        (("01", "1"), "01", 0),
        (("-1", "1"), -1, 0),
        (("true", "false"), True, 0),
        (("False", "True"), True, 1),
        (("true", "false"), "FALSE", 1),
        ((" on", "on"), " on", 0),
        (("911", "112"), 112, 1),
        (("on", "1e3"), "1e3", 1),
    ],
)
def test_a_label_is_a_name_first(names, label, index):
    assert class_reader(names)(label, LINE) == index


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (
            STARS,
            0,
            "text 7: label 0 is no class; as some classes are named by numbers, .*; have: 1, 2, 3, 4, 5",
        ),
        (("112", "on"), "0", "label 0 is no class"),
        (("01", "1"), 1.0, "label 1.0 may be any of 01, 1"),
        (WORDS, 3, "label 3 out of range; expected 0 to 2"),
        (WORDS, -1, "label -1 out of range; expected 0 to 2"),
        (WORDS, 0.5, "label 0.5 is no whole number"),
        (WORDS, "9" * 5000, "label 9999.*… out of range"),
        (WORDS, "1e0", "no label '1e0'; have: off, on, dim"),
        (WORDS, "\uff11", "no label"),
        (WORDS, "", "no label ''"),
        (WORDS, "x" * 100_000, "no label 'xxx.{1,90}; have"),
        (WORDS, True, "no label true; have: off, on, dim"),
        (("1", "0"), True, "no label true; have: 1, 0"),
        (("true", "True "), "TRUE", "no label 'TRUE'"),
        (WORDS, "\x1b[31m", r"no label '\\x1b\[31m'"),
        ([str(i) for i in range(99)], "x", r"have: 0, 1, .* and 89 more"),
    ],
)
def test_a_doubt_is_refused_with_the_line(names, label, message):
    with pytest.raises(DataError, match=message):
        class_reader(names)(label, LINE)


def test_true_and_one_are_told_apart_whichever_comes_first():
    read = class_reader(("off", "on"))
    assert read(1, LINE) == 1
    with pytest.raises(DataError, match="no label true"):
        read(True, LINE)
