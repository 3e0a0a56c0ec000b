import contextlib
import gzip
import json
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.device_runtime.contracts.manifest import Tokenizer as ManifestTokenizer
from fleetune.device_runtime.data.loading import load_dataset, text_dataset
from fleetune.device_runtime.data.records import LabelledText, read_records
from fleetune.device_runtime.data.samples import Dense, Ragged, make_dataset
from fleetune.device_runtime.errors import ConfigError, DataError

BANKING = SHARED / "data" / "banking77"
HELLO, WORLD, HI = 7592, 2088, 7632
LINES = [
    {"text": "hello world", "label": 1},
    {"text": "hi", "label": "mad", "ignored": [1]},
    {"text": "hello hello hello", "text_b": "world", "label": 0},
]


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def load(text_folder, make_manifest):
    def load_path(path, **changes):
        options = {k: changes.pop(k) for k in ("seq_len", "labelled") if k in changes}
        return load_dataset(path, make_manifest(**changes), text_folder, **{"seq_len": 128, **options})

    return load_path


def limited(ids, *, types=2):
    return (
        Input("input_ids", "int64", ("batch", "seq"), below=ids),
        Input("attention_mask", "int64", ("batch", "seq"), below=2),
        Input("token_type_ids", "int64", ("batch", "seq"), below=types),
        Input("labels", "int64", ("batch",), role="labels"),
    )


def ragged(lengths, seq_len=64):
    lengths = np.array(lengths, np.int64)
    ids = np.concatenate([np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)])
    columns = {
        "input_ids": Ragged(ids, lengths, 0, "int64"),
        "labels": Dense(np.arange(len(lengths), dtype=np.int64)),
    }
    return make_dataset(columns, lengths, seq_len=seq_len, num_classes=len(lengths), label_name="labels")


# Reading


def test_json_lines_become_padded_batches(load, tmp_path):
    dataset = load(jsonl(tmp_path / "a.jsonl", LINES))
    batch = dataset.rows(np.array([1, 2]))
    assert dataset.labels.tolist() == [1, 2, 0]
    assert np.bincount(dataset.labels).tolist() == [1, 1, 1]
    assert batch["labels"].tolist() == [2, 0]
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "input_ids": (np.int64, (2, 8)),
        "attention_mask": (np.int64, (2, 8)),
        "token_type_ids": (np.int64, (2, 8)),
        "labels": (np.int64, (2,)),
    }
    assert batch["input_ids"].tolist() == [
        [101, 7632, 102, 0, 0, 0, 0, 0],
        [101, 7592, 7592, 7592, 102, 2088, 102, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [3, 7]
    assert batch["token_type_ids"][1].tolist() == [0, 0, 0, 0, 0, 1, 1, 0]


def test_every_format_says_the_same(load, tmp_path):
    plain = jsonl(tmp_path / "a.jsonl", LINES)
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "a.csv"
    table.write_text('\ufefflabel,text,text_b\n1,"hello world",\nmad,hi,\n0,hello hello hello,world\n')
    assert len({load(path).digest for path in (plain, zipped, table)}) == 1


def test_pads_and_inputs_are_the_manifests(load, tmp_path):
    inputs = (
        Input("input_ids", "int32", ("batch", "seq"), 7),
        Input("labels", "int64", ("batch",), role="labels"),
    )
    batch = load(jsonl(tmp_path / "a.jsonl", LINES), inputs=inputs).rows(np.array([1]))
    assert batch["input_ids"].tolist() == [[101, 7632, 102, 7, 7, 7, 7, 7]]
    assert batch["input_ids"].dtype == np.int32
    assert set(batch) == {"input_ids", "labels"}


def test_texts_are_cut_at_seq_len(load, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello " * 50, "label": 0}])
    assert load(path, seq_len=11).rows(np.array([0]))["input_ids"].shape == (1, 11)
    assert load(path, seq_len=24).rows(np.array([0]))["input_ids"].shape == (1, 24)


def test_what_is_cut_off_is_told(load, tmp_path):
    lines = [{"text": "hello " * n, "label": 0} for n in (8, 98, 8)]
    dataset = load(jsonl(tmp_path / "a.jsonl", lines), seq_len=20)
    assert dataset.num_cut == 1
    assert str(dataset.cut).endswith(
        "a.jsonl: 1 of 3 samples are longer than 20 tokens (the model takes up to 512) and are cut: "
        "80 of 120 tokens (67 %) are not read"
    )
    assert "30 tokens (the most that the model takes)" in str(
        load(tmp_path / "a.jsonl", bounds={"seq": 30}).cut
    )
    assert load(tmp_path / "a.jsonl", seq_len=100).cut is None


def test_padding_stays_within_the_models_positions(load, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello " * 50, "label": 0}])
    assert load(path, bounds={"seq": 30}).rows(np.array([0]))["input_ids"].shape == (1, 30)
    assert load(path, seq_len=64, bounds={"seq": 30}).digest != load(path, seq_len=30).digest


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_loses_tokens_at_the_end_that_the_tokenizer_names(load, tmp_path, side):
    tokenizer = ManifestTokenizer("tokenizer.json", 0, 512, side)
    lines = [
        {"text": "hello " * 10 + "world " * 10, "label": 0},
        {"text": "hi", "text_b": "hello " * 10 + "world " * 10, "label": 0},
    ]
    dataset = load(jsonl(tmp_path / "a.jsonl", lines), seq_len=8, tokenizer=tokenizer)
    kept = WORLD if side == "left" else HELLO
    assert dataset.rows(np.array([0, 1]))["input_ids"].tolist() == [
        [101, *[kept] * 6, 102],
        [101, HI, 102, *[kept] * 4, 102],
    ]


def test_words_lose_their_labels_with_their_tokens_at_the_left(load, tmp_path):
    lines = [{"tokens": ["hi"] * 10 + ["hello", "world"], "labels": [0] * 10 + [1, 2]}]
    left = ManifestTokenizer("tokenizer.json", 0, 512, "left")
    path = jsonl(tmp_path / "a.jsonl", lines)
    batch = load(path, task="token-classification", seq_len=5, tokenizer=left).rows(np.array([0]))
    assert batch["input_ids"].tolist() == [[101, HI, HELLO, WORLD, 102]]
    assert batch["labels"].tolist() == [[-100, 0, 1, 2, -100]]


def test_a_token_that_the_model_has_no_row_for_is_named(load, tmp_path):
    lines = [{"text": "hi", "label": 0}] * 2 + [{"text": "hi world hello", "label": 0}]
    path = jsonl(tmp_path / "a.jsonl", lines)
    assert load(path, inputs=limited(HI + 1)).num_samples == 3
    with pytest.raises(DataError, match=r"line 3: the token 'hello' is id 7592, the model knows 0 to 7591"):
        load(
            jsonl(
                tmp_path / "b.jsonl", [{"text": "world", "label": 0}] * 2 + [{"text": "hello", "label": 0}]
            ),
            inputs=limited(HELLO),
        )
    with pytest.raises(DataError, match=r"line 1: token_type_ids 1, the model knows 0 to 0"):
        load(
            jsonl(tmp_path / "c.jsonl", [{"text": "hi", "text_b": "hi", "label": 0}]),
            inputs=limited(30522, types=1),
        )


def test_a_language_model_learns_its_own_text(load, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello world"}])
    batch = load(path, task="causal-lm").rows(np.array([0]))
    assert batch["labels"].tolist() == [[101, 7592, 2088, 102, -100, -100, -100, -100]]
    assert batch["labels"].dtype == np.int64


def test_words_have_their_class_on_their_first_token(load, tmp_path):
    lines = [{"tokens": ["hello", "unbelievably"], "labels": ["glad", 2]}, {"tokens": ["hi"], "labels": [0]}]
    batch = load(jsonl(tmp_path / "a.jsonl", lines), task="token-classification").rows(np.array([0, 1]))
    labels = batch["labels"]
    assert labels[0][:3].tolist() == [-100, 1, 2]
    assert set(labels[0][3:].tolist()) == {-100}
    assert labels[1][:3].tolist() == [-100, 0, -100]


def test_words_may_be_without_label(load, tmp_path):
    """As an integer or, out of a table, as text; a class of that name is a class."""
    lines = [{"tokens": ["hello", "hi"], "labels": [-100, "glad"]}, {"tokens": ["hi"], "labels": ["-100"]}]
    path = jsonl(tmp_path / "a.jsonl", lines)
    labels = load(path, task="token-classification").rows(np.array([0, 1]))["labels"]
    assert labels[:, :4].tolist() == [[-100, -100, 1, -100], [-100, -100, -100, -100]]
    named = load(path, task="token-classification", labels=("-100", "glad")).rows(np.array([0, 1]))["labels"]
    assert named[:, :4].tolist() == [[-100, 0, 1, -100], [-100, 0, -100, -100]]


def test_words_of_which_none_has_a_label_are_refused(load, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"tokens": ["hello", "hi"], "labels": [-100, -100]}] * 2)
    with pytest.raises(DataError, match=r"a\.jsonl: all words are labelled -100, and count for nothing"):
        load(path, task="token-classification")


def test_a_text_has_a_class(load, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello", "label": -100}])
    with pytest.raises(DataError, match="line 1: label -100 out of range; expected 0 to 2"):
        load(path)


def test_words_that_are_cut_off_take_no_label(load, tmp_path):
    lines = [{"tokens": ["hello"] * 20, "labels": [1] * 20}, {"tokens": ["hi", "hi"], "labels": [2, 0]}]
    dataset = load(jsonl(tmp_path / "a.jsonl", lines), task="token-classification", seq_len=8)
    assert dataset.rows(np.array([0, 1]))["labels"].tolist() == [
        [-100, 1, 1, 1, 1, 1, 1, -100],
        [-100, 2, 0, -100, -100, -100, -100, -100],
    ]


def test_without_labels_only_inputs_are_read(load, tmp_path, text_folder, make_manifest):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hi"}, {"text": "hello", "label": "no such"}])
    dataset = load(path, labelled=False)
    assert "labels" not in dataset.rows(np.array([0]))
    assert dataset.labels.size == 0
    assert text_dataset(["hi", "hello"], make_manifest(), text_folder, seq_len=128).digest == dataset.digest


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


# Refusing


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
            "line 2: no text; there is words, label; expected text, label and perhaps text_b$",
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
    monkeypatch.setattr("fleetune.device_runtime.data.records.LINE_MAX", 1000)
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
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "folder.jsonl", "absent.jsonl", "absent.npz"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            load(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: No such file or directory$"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"no data format '\.parquet'; have: \.csv, .*\.npz"):
        load(tmp_path / "a.parquet")


def test_tasks_and_lengths_that_do_not_go_with_text(load, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", LINES)
    with pytest.raises(DataError, match=r"task 'image-classification' takes \.npz files"):
        load(path, task="image-classification")
    with pytest.raises(DataError, match="the model takes bbox, which text does not give"):
        load(path, inputs=(Input("bbox", "int64", ("batch", "seq", 4)),))
    with pytest.raises(DataError, match="2 tokens but 1 labels"):
        load(
            jsonl(tmp_path / "b.jsonl", [{"tokens": ["a", "b"], "labels": [0]}]), task="token-classification"
        )
    for seq_len in (-1, 0, 3):
        with pytest.raises(ConfigError, match=f"sequence length {seq_len} leaves no room for text beside 3"):
            load(path, seq_len=seq_len)


def test_a_text_too_short_to_learn_from_is_named(tmp_path, make_manifest):
    words = Tokenizer(WordLevel({"hi": 0, "hello": 1}, "hi"))
    words.pre_tokenizer = Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hi hello"}, {"text": "hi"}])
    with pytest.raises(DataError, match="line 2: 1 tokens, expected at least 2"):
        load_dataset(path, make_manifest(task="causal-lm"), tmp_path, seq_len=8)


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


# Arrays

PIXELS = (
    Input("pixel_values", "float32", ("batch", 2, 4)),
    Input("labels", "int64", ("batch",), role="labels"),
)


@pytest.fixture
def load_arrays(load, tmp_path):
    def load_npz(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return load(tmp_path / "a.npz", inputs=PIXELS, task="image-classification", tokenizer=None)

    return load_npz


def test_arrays_are_taken_as_they_are(load_arrays):
    pixels = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    dataset = load_arrays(pixel_values=pixels, labels=np.array([2, 0, 1], np.uint8))
    batch = dataset.rows(np.array([2, 0]))
    assert np.array_equal(batch["pixel_values"], pixels[[2, 0]])
    assert batch["labels"].tolist() == [1, 2]
    assert batch["labels"].dtype == np.int64
    assert dataset.num_samples == 3


def test_all_that_is_wrong_with_arrays_is_listed(load_arrays):
    good = np.zeros((3, 2, 4), np.float32)
    with pytest.raises(
        DataError, match="labels: missing; pixel_values: missing; x: not an input of the model"
    ):
        load_arrays(x=good)
    with pytest.raises(DataError, match=r"expected float32\[batch, 2, 4\], got float64\[3, 8\]"):
        load_arrays(pixel_values=np.zeros((3, 8)), labels=np.zeros(3, int))
    with pytest.raises(DataError, match=r"labels: expected integers \[3\], got float64\[4\]"):
        load_arrays(pixel_values=good, labels=np.zeros(4))
    with pytest.raises(DataError, match="labels: 2 out of range, the first is 5; expected 0 to 2"):
        load_arrays(pixel_values=good, labels=np.array([0, 5, -100]))
    with pytest.raises(DataError, match="pixel_values: NaN or infinity"):
        load_arrays(pixel_values=good + np.nan, labels=np.zeros(3, int))
    with pytest.raises(DataError, match="pixel_values: no sample"):
        load_arrays(pixel_values=good[:0], labels=np.zeros(0, int))
    with pytest.raises(DataError, match=r"a\.npz: pixel_values: an array of Python objects; give it a dtype"):
        load_arrays(pixel_values=np.array([object()]), labels=np.zeros(1, int))
    with pytest.raises(DataError, match=r"\.npz: x0, x1, x10, .* and 92 more: not an input of the model$"):
        load_arrays(pixel_values=good, labels=np.zeros(3, int), **{f"x{i}": np.zeros(1) for i in range(100)})


TOKENS = (
    Input("input_ids", "int64", ("batch", "seq"), below=69),
    Input("attention_mask", "int64", ("batch", "seq")),
    Input("labels", "int64", ("batch",), role="labels"),
)


@pytest.fixture
def load_tokens(load, tmp_path):
    def load_npz(ids, mask=1, inputs=TOKENS, task="sequence-classification", labels=None, **changes):
        labels = np.zeros(len(ids), int) if labels is None else labels
        np.savez(
            tmp_path / "t.npz",
            input_ids=ids,
            attention_mask=np.full(ids.shape, mask, np.int64),
            labels=labels,
        )
        return load(tmp_path / "t.npz", inputs=inputs, task=task, **changes)

    return load_npz


def with_value(value, shape=(3, 4)):
    ids = np.full(shape, 68, np.int64)
    ids[2, 1] = value
    return ids


def test_ids_outside_the_models_tables_are_refused(load_tokens):
    assert load_tokens(with_value(0)).num_samples == 3
    for wrong in (-1, 69):
        with pytest.raises(
            DataError,
            match=rf"t\.npz: input_ids: 1 out of range, the first is {wrong} at \[2, 1\]; expected 0 to 68$",
        ):
            load_tokens(with_value(wrong))
    with pytest.raises(
        DataError, match=r"attention_mask: 12 out of range, the first is 2 at \[0, 0\]; expected 0 to 1"
    ):
        load_tokens(with_value(0), mask=2)


def test_where_no_limit_is_known_only_what_is_below_zero_is_refused(load_tokens):
    inputs = (Input("input_ids", "int64", ("batch", "seq")), *TOKENS[1:])
    assert load_tokens(with_value(10**6), inputs=inputs).num_samples == 3
    with pytest.raises(DataError, match=r"the first is -1 .*; expected 0 or more"):
        load_tokens(with_value(-1), inputs=inputs)


def test_rows_longer_than_the_model_are_refused(load_tokens):
    long = with_value(0, (3, 65))
    for changes in ({"bounds": {"seq": 64}}, {"tokenizer": ManifestTokenizer("tokenizer.json", 0, 64)}):
        with pytest.raises(DataError, match=r"t\.npz: 65 tokens a row, the model takes at most 64"):
            load_tokens(long, **changes)
    assert load_tokens(long, tokenizer=None).num_samples == 3
    with pytest.raises(DataError, match="input_ids: nothing in its rows"):
        load_tokens(long[:, :0])


def test_a_next_token_is_one_of_the_models(load_tokens):
    inputs = (*TOKENS[:2], Input("labels", "int64", ("batch", "seq"), role="labels"))
    labels = with_value(-100)
    assert load_tokens(with_value(0), inputs=inputs, labels=labels, task="causal-lm").num_samples == 3
    with pytest.raises(DataError, match="labels: 1 out of range, the first is 69; expected 0 to 68"):
        load_tokens(with_value(0), inputs=inputs, labels=with_value(69), task="causal-lm")


def test_labels_beyond_int64_are_not_wrapped(load_tokens):
    """2^64 - 100 would become the label of a position that is ignored."""
    inputs = (*TOKENS[:2], Input("labels", "int64", ("batch", "seq"), role="labels"))
    labels = np.full((3, 4), 2**64 - 100, np.uint64)
    with pytest.raises(DataError, match="labels: 12 out of range, the first is 18446744073709551516"):
        load_tokens(with_value(0), inputs=inputs, labels=labels, task="token-classification")


def write_bomb(path, name, shape, **arrays):
    """An NPZ file of some 100 kB whose array ``name`` is 100 MB of zeros."""
    np.savez(path, **arrays)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        for _ in range(100):
            file.write(bytes(1_000_000))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (12_500_000,), "x: not an input of the model"),
        ("input_ids", (2, 6_250_000), "attention_mask: expected .*; 6250000 tokens a row, the model takes"),
        ("input_ids", (12_500_000, 1), "attention_mask: expected"),
    ],
)
def test_what_does_not_fit_is_not_unpacked(load, tmp_path, name, shape, message):
    arrays = {"input_ids": with_value(0), "attention_mask": np.ones((3, 4), int), "labels": np.zeros(3, int)}
    arrays.pop(name, None)
    write_bomb(tmp_path / "a.npz", name, shape, **arrays)
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.npz", inputs=TOKENS, bounds={"seq": 64})
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_what_fits_and_is_larger_than_the_machine_is_not_unpacked(load, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 2048}.get)
    ids = np.ones((10_000, 8), np.int64)
    np.savez_compressed(tmp_path / "a.npz", input_ids=ids, attention_mask=ids, labels=ids[:, 0])
    with pytest.raises(
        DataError, match=r"a\.npz: its arrays take 1 MB, more than half of this machine's memory \(2 MB\)"
    ):
        load(tmp_path / "a.npz", inputs=TOKENS)


def npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (16, 1099511627776)}\n"), "memory"),
        (npy(b"{'descr': 'x', 'fortran_order': False, 'shape': (1,)}\n"), "cannot be read as NPZ"),
        (b"not an array", "labels: no array|cannot be read as NPZ"),
        (b"", "labels: no array|cannot be read as NPZ"),
    ],
)
def test_a_damaged_member_is_one_line(load_arrays, load, tmp_path, member, message):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", member)
    with pytest.raises(DataError, match=message):
        load(path)


def test_a_compression_that_is_not_known_is_one_line(load, tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, labels=np.zeros(3))
    content = bytearray(path.read_bytes())
    for start in (content.find(b"PK\x03\x04") + 8, content.find(b"PK\x01\x02") + 10):
        content[start] = 97
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as NPZ: That compression method"):
        load(path)


def test_one_array_without_a_name_is_refused(load, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(DataError, match="one array without a name, not NPZ"):
        load(tmp_path / "a.npz")


def test_token_arrays_may_ignore_positions(load, tmp_path):
    inputs = (
        Input("input_ids", "int64", ("batch", "seq")),
        Input("labels", "int64", ("batch", "seq"), role="labels"),
    )
    np.savez(
        tmp_path / "a.npz", input_ids=np.ones((2, 3), int), labels=np.array([[0, 2, -100], [1, -100, -100]])
    )
    dataset = load(tmp_path / "a.npz", inputs=inputs, task="token-classification")
    assert dataset.rows(np.array([1]))["labels"].tolist() == [[1, -100, -100]]


# Batching


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=120),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_an_epoch_has_each_row_once_and_depends_on_seed_and_epoch(lengths, batch_size, seed, epoch):
    dataset = ragged(lengths)
    batches = dataset.epoch_batches(seed, epoch, batch_size)
    assert len(batches) == dataset.num_batches(batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    again = dataset.epoch_batches(seed, epoch, batch_size)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    for indices in batches[:3]:
        rows = dataset.rows(indices)["input_ids"]
        longest = max(lengths[i] for i in indices)
        assert longest <= rows.shape[1] < longest + 8
        assert all(
            (row != 0).sum() == lengths[i] and set(row) <= {0, i + 1}
            for i, row in zip(indices, rows, strict=True)
        )


def test_epochs_and_seeds_differ_and_like_lengths_go_together():
    dataset = ragged(np.random.default_rng(0).integers(1, 64, 400))
    orders = {
        tuple(np.concatenate(dataset.epoch_batches(s, e, 8)).tolist()) for s, e in ((0, 0), (0, 1), (1, 0))
    }
    assert len(orders) == 3
    spread = [np.ptp(dataset.lengths[indices]) for indices in dataset.epoch_batches(0, 0, 8)]
    assert np.mean(spread) < 5  # shuffled rows would differ by about 50


def test_ordered_batches_go_from_short_to_long():
    dataset = ragged([5, 1, 9, 1, 3])
    assert np.concatenate(dataset.ordered_batches(2)).tolist() == [1, 3, 4, 0, 2]


def test_a_subset_has_its_rows_in_order_and_a_digest_of_its_own():
    dataset = ragged([5, 1, 9])
    part = dataset.subset(np.array([2, 0]))
    assert part.rows(np.array([0, 1]))["input_ids"][:, :6].tolist() == [[3] * 6, [1] * 5 + [0]]
    assert part.labels.tolist() == [2, 0]
    assert part.digest != dataset.digest
    assert part.digest == ragged([5, 1, 9]).subset(np.array([2, 0])).digest


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="batch size must be at least 1, got 0"):
        ragged([1]).epoch_batches(0, 0, 0)


@pytest.mark.shared_data
@pytest.mark.skipif(not BANKING.is_dir(), reason="no shared/data/banking77 beside the checkout")
def test_banking77_is_read_whole(load):
    names = tuple(json.loads((BANKING / "labels.json").read_text()))
    dataset = load(BANKING / "test.jsonl.gz", labels=names)
    assert dataset.num_samples == 3080
    assert np.bincount(dataset.labels).tolist() == [40] * 77
