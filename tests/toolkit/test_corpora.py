import gzip
import json
from collections import Counter

import pytest

from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.errors import DataError
from fleetune.toolkit.corpora import read_corpus


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count, **more):
    return [{"text": f"line {i}", "label": "ab"[i % 2]} | more for i in range(count)]


def test_a_fifth_is_held_out_and_every_line_kept_once(tmp_path):
    corpus = read_corpus(write(tmp_path / "a.jsonl", rows(100)), num_devices=3)
    texts = [line.text for lines in (*corpus.train.values(), corpus.test) for line in lines]
    assert len(corpus.test) == 20
    assert sorted(texts) == sorted(f"line {i}" for i in range(100))


def test_a_seed_gives_one_split(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(50))
    assert read_corpus(path, num_devices=2, seed=1) == read_corpus(path, num_devices=2, seed=1)
    assert read_corpus(path, num_devices=2, seed=1) != read_corpus(path, num_devices=2, seed=2)


@pytest.mark.parametrize("field", ["speaker", "client", "device"])
def test_a_speaker_stays_on_one_device(tmp_path, field):
    spoken = [row | {field: f"s{i % 5}"} for i, row in enumerate(rows(100))]
    corpus = read_corpus(write(tmp_path / "a.jsonl", spoken), num_devices=2)
    homes = [{line.speaker for line in lines} for lines in corpus.train.values()]
    assert not homes[0] & homes[1]
    assert set.union(*homes) == {f"s{i}" for i in range(5)}


def test_without_speakers_labels_are_skewed(tmp_path):
    corpus = read_corpus(write(tmp_path / "a.jsonl", rows(400)), num_devices=2, seed=0)
    shares = [Counter(line.label for line in lines) for lines in corpus.train.values()]
    assert shares[0]["a"] * shares[1]["b"] != shares[0]["b"] * shares[1]["a"]


def test_gzip_and_csv_and_numeric_labels(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(40))
    assert {line.label for line in read_corpus(tmp_path / "a.jsonl.gz", num_devices=2).test} <= {"0", "1"}
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t{i},{'xy'[i % 2]}\n" for i in range(40)))
    assert len(read_corpus(tmp_path / "a.csv", num_devices=2).test) == 8


def test_a_file_as_a_spreadsheet_saves_it_says_the_same(tmp_path):
    plain = read_corpus(write(tmp_path / "a.jsonl", rows(40)), num_devices=2)
    lines = ["text,label", *(f'"line {i}", {"ab"[i % 2]}' for i in range(40)), "", ","]
    (tmp_path / "a.csv").write_text("\r\n".join(lines), encoding="utf-16")
    assert read_corpus(tmp_path / "a.csv", num_devices=2) == plain


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a", "label": "b"}\nnonsense\n', r"a\.jsonl, line 2: not a JSON object"),
        ('{"text": "a"}\n', r"a\.jsonl, line 1: no label; there is text; expected text, label and perhaps"),
        ('{"text": "a", "label": " "}\n', r"a\.jsonl, line 1: no label"),
        ("[1, 2]\n", r"a\.jsonl, line 1: a JSON array"),
        ("", "no data line in the file"),
        ('{"text": "a", "label": "b"}\n' * 50, "two labels"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        read_corpus(tmp_path / "a.jsonl", num_devices=2)


def test_a_missing_file_and_too_many_devices(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_corpus(tmp_path / "none.jsonl", num_devices=2)
    with pytest.raises(DataError, match="do not reach 30 devices"):
        read_corpus(write(tmp_path / "a.jsonl", rows(20)), num_devices=30)


def test_columns_of_other_names_are_the_same_corpus(tmp_path):
    plain = read_corpus(write(tmp_path / "a.jsonl", rows(40)), num_devices=2)
    named = [{"q": row["text"], "intent": row["label"]} for row in rows(40)]
    columns = Columns(text_column="q", label_column="intent")
    other = write(tmp_path / "b.jsonl", named)
    assert read_corpus(other, num_devices=2, columns=columns) == plain
    with pytest.raises(DataError, match=r"no text, label; there is q, intent; .*--text-column"):
        read_corpus(other, num_devices=2)
