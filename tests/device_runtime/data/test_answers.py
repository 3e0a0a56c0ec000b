"""Numbers and sets of labels as rows of data: every way to write them, and what is refused with its file, row and remedy."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import as_problem

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.data.splitting import split_off
from fleetune.device_runtime.errors import DataError

TAGS = ("on", "off", "1")


@pytest.fixture
def number(word_artifact: Path) -> Manifest:
    return as_problem(open_artifact(word_artifact).manifest, "regression", ("value",))


@pytest.fixture
def pair(word_artifact: Path) -> Manifest:
    return as_problem(open_artifact(word_artifact).manifest, "regression", ("heat", "light"))


@pytest.fixture
def tags(word_artifact: Path) -> Manifest:
    return as_problem(open_artifact(word_artifact).manifest, "multi_label_classification", TAGS)


def load(path: Path, manifest: Manifest, word_artifact: Path, **columns: str) -> Dataset:
    return load_dataset(path, manifest, word_artifact, seq_len=16, columns=Columns(**columns))


def labels_of(dataset: Dataset) -> list[object]:
    found = dataset.rows(np.arange(dataset.num_samples))["labels"]
    assert found.dtype == np.float32
    return list(found.tolist())


def lines(path: Path, column: str, *values: object) -> Path:
    rows = (json.dumps({"text": "turn the lamp on", column: value}) for value in values)
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_number_is_written_many_ways(tmp_path: Path, word_artifact: Path, number: Manifest) -> None:
    path = lines(tmp_path / "a.jsonl", "label", 3, -0.5, "1.25", " 2e1 ", ".5")
    dataset = load(path, number, word_artifact)
    assert labels_of(dataset) == [3, -0.5, 1.25, 20, 0.5]
    assert not len(dataset.labels)
    assert dataset.histogram() == ()
    (tmp_path / "a.csv").write_text("text,stars\nturn on,4.5\nturn off,-1\n")
    assert labels_of(load(tmp_path / "a.csv", number, word_artifact, label_column="stars")) == [4.5, -1]


def test_several_numbers_are_a_list_or_a_cell(tmp_path: Path, word_artifact: Path, pair: Manifest) -> None:
    path = lines(tmp_path / "a.jsonl", "labels", [1, 2.5], "3; -4", "[5, 6]")
    assert labels_of(load(path, pair, word_artifact)) == [[1, 2.5], [3, -4], [5, 6]]


def test_a_set_of_labels_is_written_many_ways(tmp_path: Path, word_artifact: Path, tags: Manifest) -> None:
    values = (["off", "on"], [], "1;off", "on", '["off"]', [1.0, 0.0, 1.0], [True, False, False], [1])
    dataset = load(lines(tmp_path / "a.jsonl", "labels", *values), tags, word_artifact)
    rows = [[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [1, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert labels_of(dataset) == rows
    (tmp_path / "a.csv").write_text("text,tags\nturn on,on;1\nturn off,\n")
    assert labels_of(load(tmp_path / "a.csv", tags, word_artifact, label_column="tags")) == [
        [1, 0, 1],
        [0, 0, 0],
    ]


def test_a_table_and_lines_are_one_data_set(tmp_path: Path, word_artifact: Path, tags: Manifest) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [["off", "on"], [], ["1"]]
    plain = load(lines(tmp_path / "a.jsonl", "labels", *values), tags, word_artifact)
    table = pyarrow.table({"text": ["turn the lamp on"] * 3, "labels": values})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", tags, word_artifact).digest == plain.digest


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("much", "label 'much' is no number; expected one such as 3.5"),
        ("3,5", "label '3,5' is no number"),
        ("", "label '' is no number"),
        (True, "label true is no number"),
        ("nan", "label nan is no finite number"),
        ("-inf", "label -inf is no finite number"),
        (1e39, r"label 1e\+39 is no finite number"),
        (10**400, "is no finite number|out of range"),
    ],
)
def test_what_is_no_number_names_its_line(
    tmp_path: Path, word_artifact: Path, number: Manifest, value: object, said: str
) -> None:
    path = lines(tmp_path / "a.jsonl", "label", 1, value)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*({said})"):
        load(path, number, word_artifact)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["on", "dim"], "no label 'dim'; have: on, off, 1"),
        (["on", "on"], "a label is named twice"),
        ([0, 1, 1], "may be a row of 0 and 1, or the numbers of labels; write names"),
        ("[on", "are no JSON list .*; write a;b"),
        ("on,off", "no label 'on,off'"),
        ({"on": 1}, "Expected `str | array`"),
    ],
)
def test_what_is_no_set_of_labels_names_its_line(
    tmp_path: Path, word_artifact: Path, tags: Manifest, value: object, said: str
) -> None:
    path = lines(tmp_path / "a.jsonl", "labels", ["on"], value)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{said}"):
        load(path, tags, word_artifact)


def test_as_many_numbers_as_outputs(tmp_path: Path, word_artifact: Path, pair: Manifest) -> None:
    path = lines(tmp_path / "a.jsonl", "labels", [1, 2, 3])
    with pytest.raises(DataError, match=r"line 1: 3 numbers, expected 2: heat, light"):
        load(path, pair, word_artifact)
    with pytest.raises(DataError, match=r"line 1: no labels; there is text, label; .*--label-column"):
        load(lines(tmp_path / "b.jsonl", "label", [1, 2]), pair, word_artifact)


def test_arrays_of_answers(tmp_path: Path, word_artifact: Path, number: Manifest, tags: Manifest) -> None:
    given = {row.name: np.ones((2, 4), np.int64) for row in number.features}
    np.savez(tmp_path / "a.npz", **given, labels=np.array([1, 2]))
    assert labels_of(load(tmp_path / "a.npz", number, word_artifact)) == [1, 2]
    for labels, manifest, said in (
        (np.array([1.0, np.nan]), number, r"labels: nan at \[1\]; expected finite numbers"),
        (np.ones((2, 2)), number, r"labels: expected numbers \[2\], got float64\[2, 2\]"),
        (np.array([[0, 1, 1], [0, 2, 0]]), tags, r"labels: 2 at \[1, 1\]; expected 0 or 1"),
    ):
        np.savez(tmp_path / "b.npz", **given, labels=labels)
        with pytest.raises(DataError, match=rf"b\.npz: {said}"):
            load(tmp_path / "b.npz", manifest, word_artifact)


def test_a_folder_by_class_says_no_numbers(tmp_path: Path, word_artifact: Path, number: Manifest) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"photos: a folder by class .* learns numbers; bring an \.npz file"):
        load(tmp_path / "photos", number, word_artifact)


def test_a_split_without_two_labels_is_refused(
    tmp_path: Path, word_artifact: Path, number: Manifest, tags: Manifest
) -> None:
    same = load(lines(tmp_path / "a.jsonl", "label", 2, 2, 2), number, word_artifact)
    with pytest.raises(DataError, match=r"rows: all 3 samples have the same label: add samples of another"):
        split_off(same, 0.5, seed=0, source="rows")
    few = load(lines(tmp_path / "b.jsonl", "labels", *[["on"], ["off"]] * 2), tags, word_artifact)
    with pytest.raises(DataError, match="holds out samples of one label alone; raise it"):
        split_off(few, 0.25, seed=0, source="rows")
    parts = split_off(few, 0.75, seed=0, source="rows")
    assert (parts.training.num_samples, parts.held.num_samples) == (1, 3)
