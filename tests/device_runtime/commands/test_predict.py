import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flat import train

from fleetune.device_runtime.commands.predict import predict
from fleetune.device_runtime.contracts.artifact import BASE, MANIFEST
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError

TEXTS = ["red blue", "dog cow hen cat dog", "drill"]


@pytest.fixture(scope="module")
def run(word_artifact, word_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(word_artifact, data=word_file, out=out, epochs=6, batch_size=8, seq_len=16, lr=0.02, threads=1)
    return out


def test_a_trained_run_names_what_it_learned_in_the_order_asked(word_artifact, run):
    found = predict(word_artifact, text=TEXTS, run=run, threads=1)
    assert [p.label for p in found] == ["a", "b", "c"]
    assert [p.text for p in found] == TEXTS
    assert all(0.5 < p.score <= 1 for p in found)
    assert predict(word_artifact, text=TEXTS[1], run=run)[0].label == "b"


def test_run_and_adapter_folder_and_batch_size_make_no_difference(word_artifact, run):
    one = predict(word_artifact, text=TEXTS, run=run)
    other = predict(word_artifact, text=TEXTS, adapter=run / "adapter", batch_size=1)
    assert [p.label for p in one] == [p.label for p in other]
    assert [p.score for p in one] == pytest.approx([p.score for p in other], abs=1e-5)


def test_a_file_is_read_with_or_without_labels(word_artifact, run, word_file, tmp_path):
    (tmp_path / "plain.csv").write_text("text\n" + "\n".join(TEXTS) + "\n")
    assert predict(word_artifact, data=tmp_path / "plain.csv", run=run) == predict(
        word_artifact, text=TEXTS, run=run
    )
    found = predict(word_artifact, data=word_file, run=run)
    wanted = [line.partition(",")[::2] for line in word_file.read_text().splitlines()[1:]]
    assert [p.text for p in found] == [text for text, _ in wanted]
    assert np.mean([p.label == label for p, (_, label) in zip(found, wanted, strict=True)]) > 0.9


def test_arrays_have_no_text(word_artifact, tmp_path):
    ids = np.array([[1, 2, 3], [5, 5, 0]])
    np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=(ids > 0).astype(np.int64))
    found = predict(word_artifact, data=tmp_path / "a.npz")
    assert [p.text for p in found] == [None, None]
    assert found[0].score == pytest.approx(predict(word_artifact, text="red green blue")[0].score, abs=1e-6)


@pytest.fixture
def poisoned(word_artifact, tmp_path):
    """An artifact with NaN in its embeddings, and digests that fit."""
    folder = Path(shutil.copytree(word_artifact, tmp_path / "poisoned"))
    manifest = json.loads((folder / MANIFEST).read_text())
    row = next(row for row in manifest["tensors"] if row["name"] == "embed.weight")
    content = bytearray((folder / BASE).read_bytes())
    content[row["offset"] : row["offset"] + 4 * 64 * 16] = np.full(64 * 16, np.nan, np.float32).tobytes()
    (folder / BASE).write_bytes(content)
    manifest["files"][BASE]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_answers_that_are_no_numbers_are_refused(poisoned):
    with pytest.raises(ArtifactError, match="the model's answers are not finite: NaN in its frozen weights"):
        predict(poisoned, text="red", threads=1)


def test_weights_that_are_no_numbers_are_not_taken_for_a_learning_rate(poisoned, word_file, tmp_path):
    with pytest.raises(
        ConfigError, match=r"step 0: the loss is nan; nothing is learned yet: there is NaN in"
    ):
        train(poisoned, data=word_file, out=tmp_path / "out", steps=2, threads=1)


def test_a_text_that_is_cut_is_told(word_artifact, caplog):
    predict(word_artifact, text=["red " * 50, "dog"], threads=1)
    assert "text: 1 of 2 samples are longer than 32 tokens (the most that the model takes)" in caplog.text


def test_a_text_that_is_no_unicode_is_refused(word_artifact):
    with pytest.raises(DataError, match="text that the tokenizer cannot take"):
        predict(word_artifact, text="red \udcff", threads=1)


def test_wrong_requests_are_refused(word_artifact, run, tmp_path):
    with pytest.raises(ConfigError, match="either a text or a data file"):
        predict(word_artifact)
    with pytest.raises(ConfigError, match="either a text or a data file"):
        predict(word_artifact, text="red", data=tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="either a run or an adapter folder, got both"):
        predict(word_artifact, text="red", run=run, adapter=run)
    with pytest.raises(
        ArtifactError, match=r"no adapter here .* give the --out folder of train, aggregate or demo"
    ):
        predict(word_artifact, text="red", run=tmp_path)
    with pytest.raises(ArtifactError, match="no PEFT adapter here"):
        predict(word_artifact, text="red", adapter=tmp_path)
    with pytest.raises(DataError, match="text 2: the text is empty"):
        predict(word_artifact, text=["red", " "])
    with pytest.raises(DataError, match="no text given"):
        predict(word_artifact, text=[])


def test_answers_of_the_untrained_version_are_called_so(word_artifact, run):
    notes = []
    predict(word_artifact, text="red", on_note=notes.append)
    assert notes == ["no run and no adapter given: these answers are of version 0, which is not trained"]
    predict(word_artifact, text="red", run=run, on_note=notes.append)
    predict(word_artifact, text="red", adapter=run / "adapter", on_note=notes.append)
    assert len(notes) == 1


def test_how_far_it_is_is_told_after_every_batch(word_artifact, run):
    seen = []
    predict(word_artifact, text=["red"] * 5, run=run, batch_size=2, on_progress=seen.append)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_the_folder_of_a_demo_is_a_run(word_artifact, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "artifact").mkdir()
    assert predict(word_artifact, text=TEXTS, run=tmp_path) == predict(word_artifact, text=TEXTS, run=run)


@pytest.mark.parametrize("written", ["nested", "flat as 0.1.0 wrote it"])
def test_text_is_cut_where_the_run_cut_it(word_artifact, run, word_file, tmp_path, written):
    """What is answered is what ``--eval`` measured: what lies behind the cut has no say."""
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    arguments = content["arguments"]
    arguments["work"]["seq_len"] = 4
    content["arguments"] = arguments if written == "nested" else arguments["work"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    long, short = "red red red red dog dog dog dog dog dog", "red red red red"

    def score(text, **where):
        return predict(word_artifact, text=text, **where)[0].score

    for where in ({"run": tmp_path / "run"}, {"adapter": tmp_path / "run" / "adapter"}):
        assert score(long, **where) == pytest.approx(score(short, **where), abs=1e-6)
    assert score(long, run=run) != pytest.approx(score(short, run=run), abs=1e-3)


def test_a_damaged_record_of_a_run_is_refused(word_artifact, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for content in (b"{", b"\xff", b'{"arguments": {"work": {"seq_len": "long"}}}'):
        (tmp_path / "run" / "run.json").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"run\.json: cannot be read"):
            predict(word_artifact, text="red", run=tmp_path / "run")


def test_a_task_without_one_class_a_sample_is_told_what_works(word_artifact, tmp_path):
    artifact = shutil.copytree(word_artifact, tmp_path / "artifact")
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**manifest, "task": "causal-lm"}))
    with pytest.raises(
        ConfigError,
        match=r"for causal-lm: `train --eval` measures it, as --data with --out does here, and `merge --full`",
    ):
        predict(artifact, text="red")
