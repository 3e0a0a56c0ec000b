"""Chats fine-tune a small language model on the device as transformers and peft do, counting the answers alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from chats import chat_model, chat_tokenizer, threads, write_chats
from flat import train
from make_chat_artifact import FOLDER, TARGETS
from typer.testing import CliRunner

from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.packing import packed
from fleetune.toolkit.cli import app
from fleetune.toolkit.export import export

STEPS, BATCH, SEQ, LR = 30, 8, 256, 2e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "threads.jsonl", threads(50))


def reference(artifact: Artifact, folder: Path, kind: str) -> Any:
    """The artifact's model and adapter, as transformers and peft have them."""
    save_peft(folder, artifact.manifest, artifact.adapter())
    tokenizer = chat_tokenizer("marked")
    config = getattr(transformers, f"{kind}Config").from_pretrained(chat_model(folder / "model", kind=kind))
    base = getattr(transformers, f"{kind}ForCausalLM")(config)
    assert config.vocab_size == len(tokenizer)
    model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()
    frozen = {t.name: artifact.base(t).copy() for t in artifact.manifest.tensors if t.file == "base"}
    found = model.load_state_dict({n: torch.from_numpy(a) for n, a in frozen.items()}, strict=False)
    assert all(name.endswith((".inv_freq", ".embed_scale")) for name in found.unexpected_keys)  # made anew
    assert all("lora_" in name or "lm_head" in name for name in found.missing_keys)
    return model


def transformers_rows() -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each thread, by transformers alone."""
    found, tokenizer = [], chat_tokenizer("marked")
    for messages in threads(50):
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = made["input_ids"], made["assistant_masks"]
        found.append((ids, [i if m else -100 for i, m in zip(ids, mask, strict=True)]))
    return found


def torch_losses(model: Any, batches: list[Any], pad: int) -> list[float]:
    rows = transformers_rows()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    losses = []
    for batch in batches:
        width = max(len(rows[i][0]) for i in batch)
        ids = [rows[i][0] + [pad] * (width - len(rows[i][0])) for i in batch]
        labels = [rows[i][1] + [-100] * (width - len(rows[i][0])) for i in batch]
        mask = [[1] * len(rows[i][0]) + [0] * (width - len(rows[i][0])) for i in batch]
        optimizer.zero_grad()
        loss = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)
        ).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_losses(artifact_dir: Path, data: Path, folder: Path, kind: str) -> None:
    report = train(
        artifact_dir, data=data, out=folder / "run", steps=STEPS, batch_size=BATCH, seq_len=SEQ, lr=LR
    )
    artifact = open_artifact(artifact_dir)
    dataset = load_dataset(data, artifact.manifest, artifact.folder, seq_len=SEQ)
    epochs = [dataset.epoch_batches(0, epoch, BATCH) for epoch in range(STEPS)]
    batches = [batch for epoch in epochs for batch in epoch][:STEPS]
    tokenizer = artifact.manifest.tokenizer
    assert tokenizer is not None
    wanted = torch_losses(reference(artifact, folder, kind), batches, tokenizer.pad_id)
    assert max(abs(a - b) for a, b in zip(report.losses, wanted, strict=True)) < 1e-4
    assert wanted[-1] < wanted[0] - 0.01


def test_fifty_threads_teach_a_llama_as_transformers_and_peft_do(data: Path, tmp_path: Path) -> None:
    check_losses(FOLDER, data, tmp_path, "Llama")


@pytest.mark.slow  # a model is exported
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma"])
def test_fifty_threads_teach_exported_models_as_transformers_and_peft_do(
    data: Path, tmp_path: Path, kind: str
) -> None:
    notes: list[str] = []
    model = chat_model(tmp_path / "model", kind=kind)
    export(model, task="causal-lm", out=tmp_path / "artifact", target_modules=TARGETS, on_note=notes.append)
    assert not [note for note in notes if note.startswith(("chat template", "end of text"))]
    check_losses(tmp_path / "artifact", data, tmp_path, kind)


def check_packed(artifact_dir: Path, model: Any, folder: Path) -> None:
    """Losses of packed texts are those of transformers on the texts alone; ``model`` is the artifact's, with its adapter."""
    chats = [chat[:2] for chat in threads(24)]
    data = write_chats(folder / "short.jsonl", chats)
    artifact = open_artifact(artifact_dir)
    plain = load_dataset(data, artifact.manifest, artifact.folder, seq_len=SEQ)
    together = packed(plain, apart=True)
    report = train(
        artifact_dir,
        data=data,
        out=folder / "packed",
        steps=8,
        batch_size=3,
        seq_len=SEQ,
        lr=10 * LR,
        packing=True,
    )
    texts = [set(row[row != 0]) for row in together.rows(np.arange(together.num_samples))["attention_mask"]]
    assert together.num_samples < len(chats) / 2
    assert sum(map(len, texts)) == len(chats)
    batches = [batch for epoch in range(8) for batch in together.epoch_batches(0, epoch, 3)][:8]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=10 * LR, weight_decay=0.0
    )
    wanted = []
    for batch in batches:
        rows = together.rows(batch)
        losses, counted = [], 0
        optimizer.zero_grad()
        for ids, labels, numbers in zip(
            rows["input_ids"], rows["labels"], rows["attention_mask"], strict=True
        ):
            for number in range(1, int(numbers.max()) + 1):
                own = torch.from_numpy(labels[numbers == number])[None]
                count = int((own[:, 1:] != -100).sum())
                losses.append(
                    model(input_ids=torch.from_numpy(ids[numbers == number])[None], labels=own).loss * count
                )
                counted += count
        loss = sum(losses) / counted
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    assert max(abs(a - b) for a, b in zip(report.losses, wanted, strict=True)) < 1e-4
    assert max(wanted) - min(wanted) > 0.01


def test_packed_chats_teach_what_the_chats_teach_alone_in_transformers(tmp_path: Path) -> None:
    check_packed(FOLDER, reference(open_artifact(FOLDER), tmp_path, "Llama"), tmp_path)


@pytest.mark.slow  # a model is exported
@pytest.mark.parametrize("kind", ["GPT2", "Gemma"])
def test_packed_chats_in_other_models(tmp_path: Path, kind: str) -> None:
    """GPT-2 has positions of its own for each place, which begin anew with each text."""
    model = chat_model(tmp_path / "model", kind=kind)
    targets = ["c_attn"] if kind == "GPT2" else TARGETS
    export(model, task="causal-lm", out=tmp_path / "artifact", target_modules=targets)
    adapter = tmp_path / "adapter"
    save_peft(
        adapter, open_artifact(tmp_path / "artifact").manifest, open_artifact(tmp_path / "artifact").adapter()
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    check_packed(
        tmp_path / "artifact",
        peft.PeftModel.from_pretrained(plain, str(adapter), is_trainable=True).eval(),
        tmp_path,
    )


def test_the_command_line_splits_packs_and_measures(data: Path, tmp_path: Path) -> None:
    words = f"train {FOLDER} --data {data} --seq-len 96 --overlap 8 --packing --eval {data} --steps 3 --out {tmp_path}/run"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    again = CliRunner().invoke(
        app, f"predict {FOLDER} --run {tmp_path}/run --data {data} --overlap 8 --out {tmp_path}/seen".split()
    )
    assert again.exit_code == 0, again.output
    measured = json.loads((tmp_path / "seen" / "evaluation.json").read_text())
    assert measured["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
