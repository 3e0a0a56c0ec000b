"""Texts, data files and labels as the page reads them: the ids and classes of Python's readers, or a refusal on both sides."""

import gzip
import json

import pytest
from node_web import needs_web, run

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.data.loading import load_dataset, text_dataset
from fleetune.device_runtime.errors import DataError

pytestmark = needs_web
TEXTS = [
    "red", "red green, blue", "  cat\tdog ", "unknown words only", "cat" * 3, "nail saw " * 40, "Red",
    "ünïcode 漢字 🎉", "a-b c_d", "saw.",
]  # fmt: skip
FILES = {
    "good.csv": 'text,label\n"cat, ""dog""",a\nhen,B\n\nsaw,c\n'.replace("B", "b"),
    "crlf.csv": "text,label\r\ncat,a\r\nred green,b\r\n",
    "quoted line.csv": 'label,text\na,"cat\ndog"\n',
    "good.tsv": "text\tlabel\ncat\ta\n",
    "good.jsonl": '{"text": "cat", "label": 2}\n\n{"text": "hen saw", "label": " e "}\n{"text": "x", "label": "0"}\n',
    "array.json": '[{"text": "cat", "label": "a"}]',
    "lines.json": '{"text": "cat", "label": "a"}\n',
    "marked.csv": "\ufefftext,label\ncat,a\n",
    "half.csv": "text,label\ncat,1.0\n",
    "bad label.csv": "text,label\ncat,z\n",
    "out of range.csv": "text,label\ncat,5\n",
    "no whole.csv": "text,label\ncat,0.5\n",
    "no label.jsonl": '{"text": "cat"}\n',
    "no text.jsonl": '{"label": 1}\n',
    "empty text.jsonl": '{"text": " ", "label": 1}\n',
    "not json.jsonl": "{\n",
    "a list.jsonl": '[{"text": "cat", "label": 1}]\n',
    "short row.csv": "text,label\ncat\n",
    "open quote.csv": 'text,label\n"cat,a\n',
    "nothing.csv": "",
    "header.csv": "text,label\n",
}


def _asked(folder, artifact, texts, files, seq_len):
    cases = {"artifact": artifact, "texts": texts, "seqLen": seq_len}
    cases["files"] = [{"name": name, "content": content} for name, content in files.items()]
    path = folder / "cases.json"
    path.write_text(json.dumps(cases, default=str))
    return run("tokens.mjs", path)


def _ids(dataset):
    column = dataset.columns["input_ids"]
    ends = column.lengths.cumsum()
    return [column.values[end - size : end].tolist() for end, size in zip(ends, column.lengths, strict=True)]


def test_texts_and_files_are_read_as_in_python(word_artifact, tmp_path):
    artifact = open_artifact(word_artifact)
    found = _asked(tmp_path, word_artifact, TEXTS, FILES, 32)
    wanted = text_dataset(TEXTS, artifact.manifest, artifact.folder, seq_len=32)
    assert found["texts"]["ids"] == _ids(wanted)
    for (name, content), here in zip(FILES.items(), found["files"], strict=True):
        path = tmp_path / name
        path.write_bytes(content.encode())
        try:
            there = load_dataset(path, artifact.manifest, artifact.folder, seq_len=32)
        except DataError:
            assert isinstance(here, str), name
            assert here.startswith("DataError: "), name
        else:
            assert (here["ids"], here["labels"]) == (_ids(there), there.labels.tolist()), name


@pytest.mark.slow
@pytest.mark.shared_data
def test_two_thousand_questions_and_strange_unicode(tmp_path):
    """A real tokenizer, with texts that are cut."""
    from pretrained import MINILM, shared_data

    from fleetune import export

    out = tmp_path / "artifact"
    export(MINILM, task="sequence-classification", num_labels=2, out=out)
    with gzip.open(shared_data("banking77") / "test.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines][:2000]
    texts += [
        "ﬁ ligature",
        "e\u0301 é",
        "\u200bzero width",
        "١٢٣",
        "👩‍👩‍👧",
        "a\x00b",
        "İstanbul",
        "\u017f",
        "x" * 300,
        "…" * 50,
    ]
    artifact = open_artifact(out)
    for seq_len in (128, 12):
        found = _asked(tmp_path, out, texts, {}, seq_len)
        wanted = text_dataset(texts, artifact.manifest, artifact.folder, seq_len=seq_len)
        assert found["texts"]["ids"] == _ids(wanted)
