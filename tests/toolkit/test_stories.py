"""A published story model learns Shakespeare on the device as a causal language model; transformers writes with the result."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from flat import train
from pretrained import shared_data
from stories import stories_folder

from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.adapters import load_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.training.evaluation import evaluate
from fleetune.toolkit.export import export
from fleetune.toolkit.merge import merge

pytestmark = [pytest.mark.slow, pytest.mark.shared_data]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEQ = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_folder(tmp_path_factory.mktemp("stories") / "model")


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    out = model.parent / "artifact"
    export(model, task="causal-lm", out=out, target_modules=TARGETS)
    return out


def test_the_converted_model_tells_the_published_story(model: Path) -> None:
    assert generated(model, "Once").startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )


def test_the_head_is_exported_in_chunks_and_equals_torch(artifact: Path) -> None:
    targets = open_artifact(artifact).manifest.head.targets
    assert targets is not None
    assert targets.shift == 1
    assert selfcheck(artifact).max_relative_error < 1e-4


def test_perplexity_falls_and_the_merged_model_writes(model: Path, artifact: Path, tmp_path: Path) -> None:
    train_file, held_out = shakespeare(tmp_path)
    before = perplexity(artifact, held_out)
    report = train(
        artifact, data=train_file, out=tmp_path / "run", seq_len=SEQ, batch_size=8, steps=120, lr=5e-3
    )
    after = perplexity(artifact, held_out, adapter=tmp_path / "run" / "adapter")
    assert report.loss_last < report.loss_first
    assert after < 0.5 * before, (before, after)
    merged = merge(tmp_path / "run", out=tmp_path / "merged", full=True)
    assert torch_perplexity(merged, held_out) == pytest.approx(after, rel=1e-3)
    assert len(generated(merged, "ROMEO:")) > 40


def test_next_token_logits_at_one_place_are_those_of_the_whole(artifact: Path) -> None:
    opened = open_artifact(artifact)
    ids = np.random.default_rng(0).integers(3, 500, (3, 17))
    batch, last = {"input_ids": ids, "attention_mask": np.ones_like(ids)}, np.array([16, 4, 0])
    with open_engine(opened) as stack:
        whole = stack.predict(batch, opened.adapter())
        some = stack.predict_at(batch, opened.adapter(), last)
    np.testing.assert_allclose(some, whole[np.arange(3), last], atol=1e-5)


def shakespeare(folder: Path) -> tuple[Path, Path]:
    """The first speeches of a play: most to learn from, every fifth held out."""
    with gzip.open(shared_data("tinyshakespeare") / "input.txt.gz", "rt") as file:
        speeches = [text for text in file.read(40_000).split("\n\n") if len(text) > 40]
    rows = [json.dumps({"text": text}) + "\n" for text in speeches]
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    files[0].write_text("".join(row for i, row in enumerate(rows) if i % 5))
    files[1].write_text("".join(rows[::5]))
    return files


def perplexity(artifact: Path, data: Path, *, adapter: Path | None = None) -> float:
    opened = open_artifact(artifact, verify=False)
    dataset = load_dataset(data, opened.manifest, artifact, seq_len=SEQ)
    weights = load_peft(adapter, opened.manifest) if adapter else opened.adapter()
    with open_engine(opened) as stack:
        return math.exp(evaluate(stack, dataset, weights).loss)


def torch_perplexity(folder: Path, data: Path) -> float:
    """The same measure by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :SEQ]
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def generated(folder: Path, start: str) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(start, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))
