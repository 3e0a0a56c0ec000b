"""The federation of benchmarks/federation.py in torch + peft, one process, no transport; prints one JSON object.

Usage: torch_federation.py MODEL FOLDER SETTINGS, FOLDER = the device files and the artifact, SETTINGS = a JSON object.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from fleetune.broker.jobs.work import device_seed
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.samples import Dataset

Weights = dict[str, torch.Tensor]


def main() -> None:
    """Average, round by round, what each device learns from the same adapter on the same batches."""
    source, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    artifact = open_artifact(folder / "artifact")
    save_peft(folder / "start", artifact.manifest, artifact.adapter())
    options = {"num_labels": len(artifact.manifest.labels), "attn_implementation": "eager"}
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(source, **options)
    model = PeftModel.from_pretrained(plain, str(folder / "start"), is_trainable=True).eval()

    def read(name: str) -> Dataset:
        return load_dataset(folder / name, artifact.manifest, artifact.folder, seq_len=settings["seq_len"])

    devices, test = [read(f"device-{i}.jsonl") for i in range(settings["devices"])], read("test.jsonl")
    weights = _copied(get_peft_model_state_dict(model))
    accuracies = [accuracy(model, test)]
    started = time.monotonic()
    for number in range(settings["rounds"]):
        learnt = []
        for position, data in enumerate(devices):
            set_peft_model_state_dict(model, weights)
            seed = device_seed(settings["seed"], round_number=number + 1, position=position)
            train(model, data, settings, seed=seed)
            learnt.append(_copied(get_peft_model_state_dict(model)))
        weights = mean(learnt, [data.num_samples for data in devices])
        set_peft_model_state_dict(model, weights)
        accuracies.append(accuracy(model, test))
    figures = {
        "accuracy": accuracies[-1],
        "accuracy_by_round": accuracies,
        "wall_s": round(time.monotonic() - started, 1),
    }
    print(json.dumps(figures))


def train(model: Any, data: Dataset, settings: dict[str, Any], *, seed: int) -> None:
    """Local steps of AdamW on the batches that a device would take."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=settings["lr"], weight_decay=0.0
    )
    taken = 0
    while taken < settings["local_steps"]:
        for rows in data.epoch_batches(
            seed, taken // data.num_batches(settings["batch_size"]), settings["batch_size"]
        ):
            if taken == settings["local_steps"]:
                return
            optimizer.zero_grad()
            model(**{n: torch.from_numpy(a) for n, a in data.rows(rows).items()}).loss.backward()
            optimizer.step()
            taken += 1


def accuracy(model: Any, data: Dataset) -> float:
    """Share of right answers."""
    right = 0
    with torch.no_grad():
        for rows in data.ordered_batches(32):
            batch = data.rows(rows)
            labels = batch.pop("labels")
            logits = model(**{n: torch.from_numpy(a) for n, a in batch.items()}).logits.numpy()
            right += int(np.sum(logits.argmax(-1) == labels))
    return right / data.num_samples


def mean(learnt: list[Weights], samples: list[int]) -> Weights:
    """Weighted by samples."""
    total = sum(samples)
    return {
        n: sum(w[n].double() * (s / total) for w, s in zip(learnt, samples, strict=True)).float()
        for n in learnt[0]
    }


def _copied(weights: Weights) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


if __name__ == "__main__":
    main()
