"""What the device writes is what transformers writes, token for token: random models of several architectures, and a real one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import CAUSAL, export_folder, save_tiny
from stories import stories_folder

from fleetune.device_runtime.commands.generate import generate
from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.methods.sampling import Sampling

pytestmark = pytest.mark.slow
COUNT = 200
ROOM = {"gpt2": {"n_positions": 256}}
PROMPT = [5, 17, 99, 23, 64, 7, 31]


def greedy(artifact: Path, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after ``prompt``, one after the other."""
    opened = open_artifact(artifact)
    with open_engine(opened, threads=1) as engine:
        decoding, ids, given = engine.decode(opened.adapter()), [], prompt
        assert decoding.remembers
        for _ in range(count):
            given = [int(decoding.feed(np.array([given]))[0].argmax())]
            ids += given
    return ids


def written_by_transformers(folder: Path, prompt: list[int], count: int) -> list[int]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
        )
    return found[0, len(prompt) :].tolist()


def largest_error(artifact: Path, folder: Path) -> float:
    """Of the logits after each of 200 drawn tokens, over the largest logit: greedy texts may soon repeat themselves."""
    ids = np.random.default_rng(0).integers(4, 128, (1, COUNT))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids)).logits[0].numpy()
    opened = open_artifact(artifact)
    with open_engine(opened, threads=1) as engine:
        decoding = engine.decode(opened.adapter())
        found = np.concatenate([decoding.feed(ids[:, i : i + 1]) for i in range(COUNT)])
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_two_hundred_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    room = ROOM.get(name, {"max_position_embeddings": 256})
    model = save_tiny(name, CAUSAL, tmp_path / "model", initializer_range=0.3, **room)
    artifact = export_folder(model, CAUSAL, tmp_path / "artifact")
    assert open_artifact(artifact).manifest.has_steps
    written = greedy(artifact, PROMPT, COUNT)
    assert written == written_by_transformers(model, PROMPT, COUNT)
    assert largest_error(artifact, model) < 1e-4
    report = selfcheck(artifact)
    assert report.ok
    assert [n for n in report.tensors if ".after " in n]


@pytest.mark.shared_data
def test_a_published_model_writes_the_story_that_transformers_writes(tmp_path: Path) -> None:
    model = stories_folder(tmp_path / "model")
    artifact = export_folder(model, CAUSAL, tmp_path / "artifact")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompt = tokenizer("Once upon a time")["input_ids"]
    expected = written_by_transformers(model, prompt, COUNT)
    said: list[str] = []
    found = generate(
        artifact, prompt="Once upon a time", sampling=Sampling(max_tokens=COUNT), on_text=said.append
    )
    assert found.ids == expected[: len(found.ids)]
    assert len(found.ids) == COUNT or found.ended == "end of text"
    assert "".join(said) == found.text
    assert tokenizer.decode(prompt + found.ids, skip_special_tokens=True) == "Once upon a time" + found.text


@pytest.mark.parametrize("base_dtype", ["fp16", "int8", "int4"])
def test_rounded_weights_write_what_torch_writes_with_them(base_dtype: str, tmp_path: Path) -> None:
    model = save_tiny("qwen2", CAUSAL, tmp_path / "model")
    artifact = export_folder(model, CAUSAL, tmp_path / "artifact", base_dtype=base_dtype)
    assert open_artifact(artifact).manifest.has_steps
    report = selfcheck(artifact)
    assert report.ok
    assert max(error for name, error in report.tensors.items() if ".after " in name) <= report.limit
