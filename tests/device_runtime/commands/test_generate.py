import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from paths import DATA

from fleetune.device_runtime.commands.generate import STANDARD_INPUT, generate
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import GENERATION, MANIFEST, open_artifact
from fleetune.device_runtime.data.chat import open_chat
from fleetune.device_runtime.data.text import load_tokenizer
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ConfigError, DataError
from fleetune.device_runtime.methods.sampling import Sampling

WRITER = DATA / "tiny_writer"
CHATTY = DATA / "chat_artifact"
PROMPT = "turn the lamp off"
DRAWN = Sampling(max_tokens=40, temperature=1.5, seed=2)


def written(prompt=PROMPT, artifact=WRITER, **settings):
    settings.setdefault("sampling", Sampling(max_tokens=20))
    return generate(artifact, prompt=prompt, threads=1, **settings)


def changed(folder, manifest):
    """The artifact with another manifest."""
    out = shutil.copytree(WRITER, folder / "artifact")
    found = json.loads((out / MANIFEST).read_text())
    manifest(found)
    (out / MANIFEST).write_text(json.dumps(found))
    return out


def test_greedy_text_is_the_likeliest_tokens():
    artifact = open_artifact(WRITER)
    found = written()
    assert found.tokens == len(found.ids) == 20
    assert found.ended == "max tokens"
    assert found.remembers
    tokenizer = load_tokenizer(WRITER / "tokenizer.json", max_length=64).tokenizer
    ids = tokenizer.encode(PROMPT).ids
    with open_engine(artifact, threads=1) as engine:
        for token in found.ids:
            logits = engine.predict_at(
                {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)},
                artifact.adapter(),
                np.array([len(ids) - 1]),
            )
            assert int(logits[0].argmax()) == token
            ids.append(token)
    assert found.text == tokenizer.decode(ids)[len(PROMPT) :]


def test_what_is_told_as_it_comes_is_the_text():
    said = []
    found = written(sampling=DRAWN, on_text=said.append)
    assert "".join(said) == found.text
    assert len(said) > 3


def test_a_text_to_stop_at_is_not_written_and_nothing_of_it_is_told():
    whole = written(sampling=DRAWN).text
    for stop in (whole[5:9], whole[10:11], whole[-4:]):
        said = []
        found = written(sampling=DRAWN, stop=["never so", stop], on_text=said.append)
        assert found.ended == "stop"
        assert found.text == "".join(said) == whole[: whole.index(stop)]


def test_a_text_that_never_stops_is_told_whole_though_its_end_began_like_the_stop():
    whole = written(sampling=DRAWN).text
    found = written(sampling=DRAWN, stop=[whole[-3:] + "#"])
    assert found.text == whole
    assert found.ended == "max tokens"


def test_it_ends_at_the_end_of_text(tmp_path):
    third = written().ids[2]
    first = written().ids.index(third)
    out = shutil.copytree(WRITER, tmp_path / "artifact")
    (out / GENERATION).write_text(json.dumps({"eos_token_id": [third]}))
    content = (out / GENERATION).read_bytes()
    found = json.loads((out / MANIFEST).read_text())
    from hashlib import sha256

    found["files"][GENERATION] = {"sha256": sha256(content).hexdigest(), "size_bytes": len(content)}
    (out / MANIFEST).write_text(json.dumps(found))
    done = written(artifact=out)
    assert done.ended == "end of text"
    assert done.ids == written().ids[: first + 1]


def test_an_artifact_of_before_writes_the_same_and_says_what_it_lacks(tmp_path):
    def old(manifest):
        del manifest["prelude"]["graphs"]["step"]
        del manifest["files"][GENERATION]

    notes = []
    found = written(artifact=changed(tmp_path, old), on_note=notes.append)
    assert not found.remembers
    assert found.ids == written().ids
    assert any("no graphs for single tokens" in note for note in notes)
    assert any("which token ends a text" in note for note in notes)


def test_the_prompt_comes_from_a_file_or_standard_input_without_its_last_line_end(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(f"{PROMPT}\r\n".encode())
    assert written(None, file=tmp_path / "prompt.txt").ids == written().ids
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(f"{PROMPT}\n".encode())))
    assert written(None, file=STANDARD_INPUT).ids == written().ids


def test_an_adapter_is_a_run_or_a_peft_folder(tmp_path):
    artifact = open_artifact(WRITER)
    rng = np.random.default_rng(0)
    noisy = {n: a + rng.normal(size=a.shape).astype(np.float32) for n, a in artifact.adapter().items()}
    save_peft(tmp_path / "run" / "adapter", artifact.manifest, noisy)
    notes = []
    found = written(adapter=tmp_path / "run", on_note=notes.append)
    assert found.ids == written(adapter=tmp_path / "run" / "adapter").ids != written().ids
    assert notes == []


@pytest.mark.parametrize("count", [1, 5])
def test_it_stops_where_the_model_ends(count):
    """Each of these is a token of its own."""
    found = written("#" * (64 - count), sampling=Sampling(max_tokens=30))
    assert (found.prompt_tokens, found.tokens, found.ended) == (64 - count, count, "model length")


@pytest.mark.parametrize("length", [64, 200])
def test_a_prompt_that_fills_the_model_is_refused_with_the_remedy(length):
    with pytest.raises(
        DataError,
        match=f"the prompt has {length} tokens, the model takes 64 with its answer: shorten it to 63",
    ):
        written("#" * length)


def test_what_cannot_be_asked_is_refused(tmp_path, word_artifact):
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    for settings, error, words in (
        ({"prompt": None}, ConfigError, "needs either a prompt or a file"),
        ({"file": tmp_path / "latin.txt"}, ConfigError, "needs either a prompt or a file"),
        (
            {"prompt": None, "file": tmp_path / "latin.txt"},
            DataError,
            "latin.txt: cannot be read as UTF-8 text",
        ),
        ({"prompt": None, "file": tmp_path / "none.txt"}, DataError, "none.txt: .*No such file"),
        ({"prompt": ""}, DataError, "the prompt is empty"),
        ({"stop": [""]}, ConfigError, "empty text to stop at"),
        ({"sampling": Sampling(top_p=0)}, ConfigError, "top_p must be above 0"),
        (
            {"artifact": word_artifact},
            ConfigError,
            "is for sequence-classification: its head answers with one of 5",
        ),
    ):
        with pytest.raises(error, match=words):
            written(**settings)


def test_an_artifact_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no tokenizer"):
        written(artifact=changed(tmp_path, lambda manifest: manifest.pop("tokenizer")))


def test_a_chat_is_written_by_the_artifacts_template():
    artifact = open_artifact(CHATTY)
    said = [{"role": "system", "content": "be short"}, {"role": "user", "content": "lamp on"}]
    with open_chat(artifact.manifest, CHATTY) as chat:
        text = chat.render(said, add_generation_prompt=True)
    plain = load_tokenizer(CHATTY / "tokenizer.json", max_length=256).tokenizer
    ids = plain.encode(text, add_special_tokens=False).ids
    found = written("lamp on", CHATTY, chat=True, system="be short", sampling=Sampling(max_tokens=5))
    assert found.prompt_tokens == len(ids)
    with open_engine(artifact, threads=1) as engine:
        batch = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        logits = engine.predict_at(batch, artifact.adapter(), np.array([len(ids) - 1]))
    assert found.ids[0] == int(logits[0].argmax())


def test_a_system_without_a_chat_is_refused():
    with pytest.raises(ConfigError, match="give --chat too"):
        written(system="be short")
