import contextlib
import gzip
import time

import pytest
from data_files import LINES, jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.device_runtime.data.records import LabelledText, read_records
from fleetune.device_runtime.errors import DataError


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_files_as_spreadsheets_save_them_say_the_same(load, tmp_path, encoding, ending):
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    plain = jsonl(tmp_path / "a.jsonl", LINES)
    (tmp_path / "b.jsonl").write_bytes((mark + plain.read_text().replace("\n", ending)).encode(encoding))
    rows = [
        "label, text,text_b",
        "1,hello world,",
        "",
        ",,",
        '"mad ",hi,',
        "0,hello hello hello,world",
        "",
        "",
    ]
    (tmp_path / "b.csv").write_bytes((mark + ending.join(rows)).encode(encoding))
    assert len({load(tmp_path / name).digest for name in ("a.jsonl", "b.jsonl", "b.csv")}) == 1


def test_files_that_were_joined_have_marks_inside(load, tmp_path):
    line = b'\xef\xbb\xbf{"text": "hi", "label": 0}\n'
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + line)
    assert load(tmp_path / "a.jsonl").labels.tolist() == [0, 0]


def test_a_broken_wide_file_is_named(load, tmp_path):
    whole = "text,label\nhi,0\n".encode("utf-16")
    (tmp_path / "a.csv").write_bytes(whole + b"\x00\xd8")
    with pytest.raises(DataError, match=r"a\.csv, line \d: not UTF-16, as its mark says"):
        load(tmp_path / "a.csv")


def test_a_long_cell_is_a_text_like_any_other(load, tmp_path):
    (tmp_path / "a.csv").write_text(f'text,label\n"{"hello " * 30_000}",1\n')
    jsonl(tmp_path / "a.jsonl", [{"text": "hello " * 30_000, "label": 1}])
    assert load(tmp_path / "a.csv").digest == load(tmp_path / "a.jsonl").digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "hi", "label": 0}\n\n{"text": "hi", "lab', "line 3: not a JSON object"),
        ('["hi", 0]\n', "line 1: a JSON array; expected an object on each line"),
        ('[\n  {"text": "hi", "label": 0}\n]\n', "line 1: a JSON array; expected an object on each line"),
        ('{"text": "hi"}\n', "line 1: no label; there is text; expected text, label and perhaps text_b"),
        ('{"utterance": "hi", "intent": 0}\n', "line 1: no text, label; there is utterance, intent;"),
        ("{}\n", "line 1: no text, label; there is nothing;"),
        ('{"text": "hi", "label": 0}\n\0\0\0\0', "line 2: NUL bytes"),
        ('{"text": 5, "label": 0}\n', r"line 1: Expected `str`, got `int` - at `\$.text`"),
        ('{"text": "hi", "label": 1.5}\n', "line 1: label 1.5 is no whole number"),
        ('{"text": "hi", "label": [1]}\n', "line 1: Expected `bool | int | float | str`, got `array`"),
        ('{"text": "hi", "label": true}\n', "line 1: no label true; have: sad, glad, mad"),
        ('{"text": "hi", "label": 3}\n', "line 1: label 3 out of range; expected 0 to 2"),
        ('{"text": "hi", "label": -1}\n', "line 1: label -1 out of range; expected 0 to 2"),
        ('{"text": "hi", "label": "bad"}\n', "line 1: no label 'bad'; have: sad, glad, mad"),
        ('{"text": " ", "label": 0}\n', "line 1: the text is empty"),
        ("", "no data line in the file"),
        ("\n \r\n", "no data line in the file"),
    ],
)
def test_a_bad_line_is_named(load, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message.replace("|", r"\|")) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nhi,0\n\nhi,9\n", "line 4: label 9 out of range"),
        ("text,label\nhi,0\nhi\n", "line 3: 1 columns, the header has 2: text, label"),
        (
            "words,label\nhi,0\n",
            "line 2: no text; there is words, label; expected text, label and perhaps text_b; --text-column, .* say which$",
        ),
        ("text;label\nhi;0\n", "there is text;label; expected .*, separated by ',' and not by ';'$"),
        ("text\tlabel\nhi\t0\n", r"there is text.label; expected .*, separated by ',' and not by '\\t'$"),
        ("text,label,label\nhi,0,1\n", "line 1: two columns are named label"),
        ("text,label\nh\0i,0\n", "line 2: NUL bytes"),
        ('text,label\n"hi,0\n', "line 2: not CSV: unexpected end of data"),
        ("text,label\nhi,9\n", "line 2: label 9 out of range"),
        ("text,label\n", "no data line in the file"),
    ],
)
def test_a_bad_row_is_named(load, tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(path)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lines_end_as_any_spreadsheet_ends_them(load, tmp_path, end, encoding):
    lines = ["text,label", '"a\nb",1', "c,2", "d,9"]
    (tmp_path / "a.csv").write_bytes(end.join(lines).encode(encoding))
    with pytest.raises(DataError, match="line 5: label 9 out of range"):
        load(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(f"text,label{end}hi,1\rho,2\r\nhi,0{end}".encode(encoding))
    assert load(tmp_path / "a.csv").labels.tolist() == [1, 2, 0]


def test_many_columns_take_no_longer_each(load, tmp_path):
    names = [f"c{i}" for i in range(20_000)]
    (tmp_path / "a.csv").write_text(f"text,label,{','.join(names)}\nhi,1{',x' * len(names)}\n")
    started = time.process_time()
    assert load(tmp_path / "a.csv").labels.tolist() == [1]
    assert time.process_time() - started < 2.0  # 6 s where each name was counted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b'{"text": "' + b"r" * 5000, r"line 1: a line of more than 0 MB"),
        ("a.csv.gz", b"text,label\nhi,1\n" + b"r" * 5000, "line 3: a line of more than"),
        ("a.csv.gz", b'text,label\n"' + b"r\n" * 5000, "line [0-9]+: a cell of more than"),
        ("a.jsonl.gz", ("\ufeff" + "r" * 5000).encode("utf-16-le"), "line 1: a line of more than"),
    ],
)
def test_a_line_without_end_is_not_read_to_its_end(load, tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("fleetune.device_runtime.data.lines.LINE_MAX", 1000)
    (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_bytes_that_are_no_text_are_named(load, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "hi", "label": 0}\n{"text": "\xff", "label": 0}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_bytes(b"text,label\nhi,0\n\xff,0\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: not UTF-8"):
        load(tmp_path / "a.csv")


def test_a_file_that_cannot_be_read_is_named(load, tmp_path):
    whole = gzip.compress(b'{"text": "hi", "label": 0}\n' * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "absent.jsonl", "absent.npz"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            load(tmp_path / name)
    with pytest.raises(DataError, match=r"folder\.jsonl: expected a folder for each class, found none"):
        load(tmp_path / "folder.jsonl")
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: No such file or directory$"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"no data format '\.doc'; have: \.arrow, \.csv, .*\.npz"):
        load(tmp_path / "a.doc")


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)),
    st.sampled_from(["a.jsonl", "a.csv", "a.csv.gz"]),
)
def test_whatever_the_bytes_a_reader_yields_records_or_a_data_error(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert all(isinstance(record, LabelledText) for _, record in read_records(path, LabelledText))
