"""Small random models with heads of every problem type, exported with a tokenizer, and their own training in transformers."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tiny_tokenizers import NUM_TOKENS, WORDS, word_tokenizer

from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.toolkit.export import export

TAGS = ["on", "off", "urgent"]
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def save_classifier(folder: Path, **settings: Any) -> Path:
    """A random BERT for sequences with a tokenizer of twelve words; ``settings`` of its configuration."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        initializer_range=0.3, vocab_size=NUM_TOKENS, max_position_embeddings=32, **_SIZES, **settings
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    word_tokenizer(model_max_length=32).save_pretrained(folder)
    return folder


def export_classifier(folder: Path, **settings: Any) -> Path:
    """Such a model exported: the model is in ``folder/model``, the artifact in ``folder/artifact``."""
    save_classifier(folder / "model")
    task = "sequence-classification"
    export(folder / "model", task=task, out=folder / "artifact", on_note=lambda _: None, **settings)
    return folder / "artifact"


def in_transformers(artifact: Path, folder: Path) -> Any:
    """The exported model as transformers and peft load it by what the artifact says, dropout off, its adapter to be trained."""
    opened = open_artifact(artifact, verify=False)
    save_peft(folder, opened.manifest, opened.adapter())
    torch.manual_seed(opened.manifest.origin.seed)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        artifact.parent / "model",
        num_labels=len(opened.manifest.labels),
        problem_type=opened.manifest.problem_type or None,
        ignore_mismatched_sizes=True,
        attn_implementation="eager",
    )
    return peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()


def trained(
    model: Any, batches: list[dict[str, Any]], *, loss_of: Any = None, lr: float = 1e-2
) -> list[float]:
    """Losses of AdamW over ``batches``: the model's own, or ``loss_of(logits, labels)``; the model learns."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for batch in batches:
        given = {name: torch.from_numpy(array) for name, array in batch.items()}
        optimizer.zero_grad()
        if loss_of is None:
            loss = model(**given).loss
        else:
            labels = given.pop("labels")
            loss = loss_of(model(**given).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rows(num_rows: int) -> list[dict[str, Any]]:
    """Texts of those words with a number, two numbers, a class and a set of labels each."""
    found = []
    for i in range(num_rows):
        words = [WORDS[(i * 3 + j * (i % 4 + 1)) % len(WORDS)] for j in range(2 + i % 5)]
        tags = [tag for j, tag in enumerate(TAGS) if (i >> j) & 1]
        number = round(0.37 * (i % 7) - 0.8, 3)
        row = {
            "text": " ".join(words),
            "number": number,
            "both": [number, i % 3 - 1.5],
            "class": TAGS[i % 3 // 2],
        }
        found.append(row | {"labels": tags})
    return found


def write_rows(path: Path, num_rows: int = 24) -> Path:
    """:func:`rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(num_rows)))
    return path
