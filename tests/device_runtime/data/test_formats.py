"""Every format of rows gives the same data set, to the bit; what is damaged is named with its row."""

import csv
import json
import shutil
import sys

import pytest
from data_files import LINES, jsonl
from paths import ROOT

from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.records import Tokens, read_records
from fleetune.device_runtime.errors import ConfigError, DataError

SAVED = ROOT / "tests" / "data" / "datasets_folder"
"""By ``save_to_disk`` of datasets 5.2.0, in two files; its ClassLabel has the classes in an order of its own."""
SADNESS = ("sad", "glad", "mad")
RENAMED = Columns(text_column="utterance", pair_column="second", label_column="intent")


def rows(lines=LINES):
    named = [{"text_b": "", **line} for line in lines]
    return [
        {**line, "label": SADNESS[label] if isinstance(label := line["label"], int) else label}
        for line in named
    ]


def renamed(lines):
    names = {"text": RENAMED.text_column, "text_b": RENAMED.pair_column, "label": RENAMED.label_column}
    return [{names.get(name, name): value for name, value in line.items()} for line in lines]


def write_json(path, lines):
    path.write_text(json.dumps(lines, indent=1))


def write_separated(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*lines[0]], extrasaction="ignore", delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(lines)


def table(lines):
    pyarrow = pytest.importorskip(
        "pyarrow", reason="pyarrow is not installed: pip install 'fleetune[parquet]'"
    )
    return pyarrow.Table.from_pylist([{**line, "ignored": None} for line in lines])


def write_parquet(path, lines):
    found = table(lines)
    import pyarrow.parquet

    pyarrow.parquet.write_table(found, path, row_group_size=2)


def write_arrow(path, lines, *, stream=False):
    found = table(lines)
    import pyarrow.ipc

    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(path, found.schema) as writer:
        writer.write_table(found, max_chunksize=2)


WRITERS = {
    "a.json": write_json,
    "a.csv": write_separated,
    "a.tsv": write_separated,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("columns", [Columns(), RENAMED], ids=["usual", "renamed"])
def test_all_formats_say_the_same(load_columns, tmp_path, name, columns):
    usual = load_columns(jsonl(tmp_path / "a.jsonl", LINES), Columns())
    WRITERS[name](tmp_path / name, renamed(rows()) if columns is RENAMED else rows())
    assert load_columns(tmp_path / name, columns).digest == usual.digest


def test_a_folder_of_datasets_says_the_same_whatever_its_order_of_classes(load, tmp_path):
    pytest.importorskip("pyarrow")
    usual = load(jsonl(tmp_path / "a.jsonl", LINES)).digest
    assert load(SAVED).digest == usual
    cache = tmp_path / "cache"  # as load_dataset leaves one: features, and no state
    shutil.copytree(SAVED, cache, ignore=shutil.ignore_patterns("state.json"))
    assert load(cache).digest == usual
    write_arrow(tmp_path / "a.arrow", rows(), stream=True)
    assert load(tmp_path / "a.arrow").digest == usual


def test_classes_of_words_are_named_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    feature = {"feature": {"names": ["O", "B"], "_type": "ClassLabel"}, "_type": "List"}
    said = json.dumps({"info": {"features": {"labels": feature}}})
    found = pyarrow.table({"tokens": [["a", "b"]], "labels": [[1, -100]]}).replace_schema_metadata(
        {"huggingface": said}
    )
    import pyarrow.ipc

    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", found.schema) as writer:
        writer.write_table(found)
    from fleetune.device_runtime.data.records import LabelledTokens

    ((_, record),) = read_records(tmp_path / "a.arrow", LabelledTokens)
    assert record.labels == ["B", -100]


@pytest.mark.parametrize("name", ["a.jsonl", *WRITERS])
def test_a_column_that_is_not_there_is_named_with_the_choices(load_columns, tmp_path, name):
    write = WRITERS.get(name, jsonl)
    write(tmp_path / name, renamed(rows()))
    for columns, missing in (
        (Columns(), "no text, label; there is second, utterance, intent"),
        (Columns(text_column="said", label_column="intent"), "no said; there is second, utterance, intent"),
        (Columns(text_column="utterance", pair_column="b", label_column="intent"), "no b; there is "),
    ):
        with pytest.raises(
            DataError, match=f"{missing}.*; --text-column, --pair-column and --label-column say which$"
        ):
            load_columns(tmp_path / name, columns)


def test_two_fields_from_one_column_are_refused(load_columns, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", LINES)
    with pytest.raises(ConfigError, match="two fields from one column: text from 'label'"):
        load_columns(path, Columns(text_column="label"))


def test_a_value_of_a_wrong_kind_is_named_by_its_own_column(load_columns, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"said": 5, "label": 0}])
    with pytest.raises(DataError, match=r"line 1: Expected `str`, got `int` - at `\$\.said`"):
        load_columns(path, Columns(text_column="said"))


def test_a_parquet_file_that_is_cut_short_is_named(load, tmp_path):
    write_parquet(tmp_path / "a.parquet", rows())
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"", b"PAR1"):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(
            DataError, match=r"a\.parquet: not a whole Parquet file: .*; write or copy it again$"
        ):
            load(tmp_path / "a.parquet")


def test_bad_rows_of_a_table_are_named(load, tmp_path):
    write_parquet(tmp_path / "a.parquet", [*rows(), {"text": None, "text_b": "", "label": "sad"}])
    with pytest.raises(DataError, match=r"a\.parquet, row 4: Expected `str`, got `null` - at `\$\.text`"):
        load(tmp_path / "a.parquet")
    write_parquet(tmp_path / "a.parquet", [*rows(), {"text": "hi", "text_b": None, "label": "bad"}])
    with pytest.raises(DataError, match="row 4: no label 'bad'; have: sad, glad, mad"):
        load(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", rows())
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.parquet.read_table(tmp_path / "b.parquet")[:0], tmp_path / "b.parquet"
    )
    with pytest.raises(DataError, match="no data line in the file"):
        load(tmp_path / "b.parquet")


def test_few_bytes_that_stand_for_many_rows_are_refused(tmp_path, monkeypatch):
    found = table([{"text": "x" * 10_000}] * 2000)
    import pyarrow.parquet

    pyarrow.parquet.write_table(found, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 30_000
    monkeypatch.setattr("fleetune.device_runtime.data.columnar.UNPACKED_MIN", 1 << 20)
    from fleetune.device_runtime.data.records import Text

    with pytest.raises(DataError, match="its rows take more than 512 times the file and 1 MB"):
        list(read_records(tmp_path / "a.parquet", Text))


def test_only_what_is_wanted_of_a_table_is_read(tmp_path):
    write_arrow(tmp_path / "a.arrow", [{"tokens": ["a"], "other": 1}])
    ((_, record),) = read_records(tmp_path / "a.arrow", Tokens)
    assert record == Tokens(["a"])


def test_several_splits_are_named(load, tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits test, train; give one of them, as .*/train$"):
        load(tmp_path)


def test_a_folder_says_only_files_of_its_own(load, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(DataError, match=r"state\.json: '\.\./x\.arrow' is no file of this folder"):
        load(tmp_path)
    (tmp_path / "state.json").write_text("[")
    with pytest.raises(DataError, match=r"state\.json: cannot be read"):
        load(tmp_path)


def test_a_json_array_is_named_by_its_items(load, tmp_path):
    path = tmp_path / "a.json"
    for content, message in (
        ('[{"text": "hi", "label": 0}, {"text": "hi"}]', "a.json, item 2: no label; there is text"),
        ('[{"text": "hi", "label": 0}', "a.json: not a JSON array of objects: Input data was truncated"),
        ("[]", "no data line in the file"),
        ("", "no data line in the file"),
        ("[5]", "item 1: Expected `object`, got `int`"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load(path)


def test_a_json_file_of_lines_is_read_as_lines(load, tmp_path):
    usual = jsonl(tmp_path / "a.jsonl", LINES)
    shutil.copy(usual, tmp_path / "a.json")
    assert load(tmp_path / "a.json").digest == load(usual).digest


def test_without_its_library_a_table_says_which_extra_to_install(load, tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"pip install 'fleetune\[parquet\]'"):
        load(tmp_path / "a.parquet")


@pytest.fixture
def load_columns(load):
    return lambda path, columns: load(path, columns=columns)
