import contextlib
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.device_runtime.data.loading import load_dataset, text_dataset
from fleetune.device_runtime.data.records import LabelledText, read_records
from fleetune.device_runtime.data.samples import Dense, Ragged, make_dataset
from fleetune.device_runtime.errors import ConfigError, DataError

BANKING = SHARED / "data" / "banking77"
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


def ragged(lengths, seq_len=64):
    lengths = np.array(lengths, np.int64)
    ids = np.concatenate([np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)])
    columns = {
        "input_ids": Ragged(ids, lengths, 0, "int64"),
        "labels": Dense(np.arange(len(lengths), dtype=np.int64)),
    }
    return make_dataset(columns, lengths, seq_len=seq_len, num_classes=len(lengths))


# Reading


def test_json_lines_become_padded_batches(load, tmp_path):
    dataset = load(jsonl(tmp_path / "a.jsonl", LINES))
    batch = dataset.rows(np.array([1, 2]))
    assert dataset.labels.tolist() == [1, 2, 0]
    assert dataset.label_counts().tolist() == [1, 1, 1]
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
    inputs = (Input("input_ids", "int32", ("batch", "seq"), 7), Input("labels", "int64", ("batch",)))
    batch = load(jsonl(tmp_path / "a.jsonl", LINES), inputs=inputs).rows(np.array([1]))
    assert batch["input_ids"].tolist() == [[101, 7632, 102, 7, 7, 7, 7, 7]]
    assert batch["input_ids"].dtype == np.int32
    assert set(batch) == {"input_ids", "labels"}


def test_texts_are_cut_at_seq_len(load, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello " * 50, "label": 0}])
    assert load(path, seq_len=11).rows(np.array([0]))["input_ids"].shape == (1, 11)
    assert load(path, seq_len=24).rows(np.array([0]))["input_ids"].shape == (1, 24)


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


# Refusing


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "hi", "label": 0}\n\n', "line 2: empty line"),
        ('{"text": "hi", "label": 0}\n{"text": "hi", "lab', "line 2: not a JSON object"),
        ('["hi", 0]\n', "line 1: Expected `object`, got `array`"),
        ('{"text": "hi"}\n', "line 1: Object missing required field `label`"),
        ('{"label": 0}\n', "line 1: Object missing required field `text`"),
        ('{"text": 5, "label": 0}\n', r"line 1: Expected `str`, got `int` - at `\$.text`"),
        ('{"text": "hi", "label": 1.5}\n', "line 1: Expected `int | str`, got `float`"),
        ('{"text": "hi", "label": true}\n', "line 1: Expected `int | str`, got `bool`"),
        ('{"text": "hi", "label": 3}\n', "line 1: label 3 out of range; expected 0 to 2"),
        ('{"text": "hi", "label": -1}\n', "line 1: label -1 out of range; expected 0 to 2"),
        ('{"text": "hi", "label": "bad"}\n', "line 1: no label 'bad'; have: sad, glad, mad"),
        ('{"text": " ", "label": 0}\n', "line 1: the text is empty"),
        ("", "no data line in the file"),
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
        ("text,label\nhi,0\n\nhi,1\n", "line 3: empty line"),
        ("text,label\nhi,0\nhi\n", "line 3: 1 columns, the header has 2: text, label"),
        ("words,label\nhi,0\n", "line 2: Object missing required field `text`"),
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


def test_bytes_that_are_no_text_are_named(load, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "hi", "label": 0}\n{"text": "\xff", "label": 0}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_bytes(b"text,label\nhi,0\n\xff,0\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: not CSV"):
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

PIXELS = (Input("pixel_values", "float32", ("batch", 2, 4)), Input("labels", "int64", ("batch",)))


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
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        load_arrays(pixel_values=np.array([object()]), labels=np.zeros(1, int))


def test_token_arrays_may_ignore_positions(load, tmp_path):
    inputs = (Input("input_ids", "int64", ("batch", "seq")), Input("labels", "int64", ("batch", "seq")))
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
    assert dataset.label_counts().tolist() == [40] * 77
