"""Names of the classes as people have them: other encodings, separators inside, numbers, what the checkpoint says."""

import codecs
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.labels import choose_labels, compare_labels, names_in, read_labels

LINES = "off\r\non\r\nlater, perhaps\r\n"


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        codecs.BOM_UTF8 + LINES.encode(),
        codecs.BOM_UTF16_LE + LINES.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + LINES.encode("utf-32-le"),
        b"off\ron\rlater, perhaps",
        b"  off \n\non\t\nlater, perhaps\n\n",
        codecs.BOM_UTF8 + b'["off", "on", " later, perhaps"]',
    ],
)
def test_a_file_of_any_make_names_the_same_classes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(data)
    assert read_labels(tmp_path / "labels", 3) == ["off", "on", "later, perhaps"]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_separate_names(inside: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(f"a{inside}b\nc\n".encode())
    assert read_labels(tmp_path / "labels", None) == [f"a{inside}b", "c"]


def test_numbers_in_a_json_list_are_names_as_lines_are(tmp_path: Path) -> None:
    (tmp_path / "json").write_text('[1, "2", "03"]')
    (tmp_path / "lines").write_text("1\n2\n03\n")
    assert read_labels(tmp_path / "json", None) == read_labels(tmp_path / "lines", None) == ["1", "2", "03"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a\na \nb\n", "3 labels, 2 of them distinct: .*more than once: a"),
        (b'[1, "1"]', "2 labels, 1 of them distinct"),
        (b"warmth\n", r"1 label: expected two or more; .*--problem-type regression"),
        (b'["a", ""]', "label 2 of 2 is empty"),
        (b'["a", true]', "expected a JSON list of names"),
        (b'["a", 1.0]', "expected a JSON list of names"),
        (b'{\n"0": "off",\n"1": "on"\n}', "expected a JSON list of names"),
        (b'["a", "b"', "neither a JSON list nor one label a line"),
        (b"[" * 100_000, "neither a JSON list nor one label a line"),
        ("caf\xe9\nbar\n".encode("latin-1"), "labels are not UTF-8"),
        ("off\non\n".encode("utf-16-le"), "they hold zero bytes"),
    ],
)
def test_a_file_that_is_no_list_of_names(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        read_labels(tmp_path / "labels", None)


@pytest.mark.parametrize("make", [Path, lambda path: Path(path).parent])
def test_a_file_that_is_not_there(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"labels cannot be read: (No such file|Is a directory)"):
        read_labels(make(tmp_path / "labels"), None)


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ({"0": "NEGATIVE", "1": "POSITIVE"}, ["NEGATIVE", "POSITIVE"]),
        ({1: "b", 0: "a"}, ["a", "b"]),
        ({"0": "LABEL_0", "1": "LABEL_1"}, []),
        ({"0": "label_0", "1": "label_1"}, []),
        ({"0": "a", "2": "b"}, []),
        ({"0": "a", "1": "a"}, []),
        (None, []),
    ],
)
def test_names_of_a_checkpoint(table: object, names: list[str]) -> None:
    assert names_in({"id2label": table}) == names


def test_the_checkpoints_names_stand_where_none_are_given() -> None:
    config, notes = {"id2label": {"0": "no", "1": "yes"}}, []
    assert choose_labels(None, None, config=config, tell=notes.append) == ["no", "yes"]
    assert choose_labels(None, 2, config=config, tell=notes.append) == ["no", "yes"]
    assert notes == ["labels: as the checkpoint names them, no, yes"] * 2
    assert choose_labels(None, 3, config=config, tell=print) == ["label_0", "label_1", "label_2"]
    assert choose_labels(["a", "b"], None, config=config, tell=print) == ["a", "b"]
    with pytest.raises(ConfigError, match="give --num-labels N or --labels FILE"):
        choose_labels(None, None, config={}, tell=print)


@pytest.mark.parametrize(
    ("given", "told"),
    [(["no", "yes"], None), (["yes", "no"], "in another order: no, yes"), (["off", "on"], "by other names")],
)
def test_a_head_that_knows_its_classes_otherwise_is_told(given: list[str], told: str | None) -> None:
    notes: list[str] = []
    compare_labels(given, {"id2label": {0: "no", 1: "yes"}}, tell=notes.append)
    assert [told in note for note in notes] == [True] if told else notes == []
