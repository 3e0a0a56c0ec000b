import gzip
import json

import numpy as np
import pytest
from data_files import LINES, jsonl
from paths import SHARED
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.device_runtime.contracts.manifest import Tokenizer as ManifestTokenizer
from fleetune.device_runtime.data.loading import load_dataset, text_dataset
from fleetune.device_runtime.errors import ConfigError, DataError

BANKING = SHARED / "data" / "banking77"


HELLO, WORLD, HI = 7592, 2088, 7632


def limited(ids, *, types=2):
    return (
        Input("input_ids", "int64", ("batch", "seq"), below=ids),
        Input("attention_mask", "int64", ("batch", "seq"), below=2),
        Input("token_type_ids", "int64", ("batch", "seq"), below=types),
        Input("labels", "int64", ("batch",), role="labels"),
    )


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


@pytest.mark.shared_data
@pytest.mark.skipif(not BANKING.is_dir(), reason="no shared/data/banking77 beside the checkout")
def test_banking77_is_read_whole(load):
    names = tuple(json.loads((BANKING / "labels.json").read_text()))
    dataset = load(BANKING / "test.jsonl.gz", labels=names)
    assert dataset.num_samples == 3080
    assert np.bincount(dataset.labels).tolist() == [40] * 77
