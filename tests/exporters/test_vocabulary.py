"""The memory of a head with a large vocabulary: in chunks against all tokens at once, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures import CAUSAL, export_folder

VOCABULARY, BATCH, SEQ = 32_000, 8, 128
STEP = """
import json, sys
import numpy as np
from fleetune.device_runtime.engine import stack as stacks
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.plans import full
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.commands.peak_memory import peak_rss_mb
stacks.LOGITS_BYTES = int(sys.argv[2])
artifact = open_artifact(sys.argv[1])
ids = np.random.default_rng(0).integers(5, 32000, (8, 128))
batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
with open_engine(artifact) as stack:
    before = peak_rss_mb()
    loss = [stack.step(batch, full(2), artifact.adapter()).loss for _ in range(3)][-1]
print(json.dumps({"loss": loss, "grown_mb": peak_rss_mb() - before}))
"""


@pytest.mark.slow
def test_logits_never_exist_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    artifact = export_folder(tmp_path / "model", CAUSAL, tmp_path / "artifact")
    whole = measured(artifact, 1 << 40)
    chunked = measured(artifact, 16 * 1024**2)
    assert chunked["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    logits_mb = BATCH * SEQ * VOCABULARY * 4 / 1e6
    print(f"logits {logits_mb:.0f} MB; grown by {whole} at once, {chunked} in chunks")
    # Logits, their softmax and its gradient are gone; what is left is mostly sessions and activations of the blocks.
    assert whole["grown_mb"] - chunked["grown_mb"] > 3 * logits_mb


def measured(artifact: Path, logits_bytes: int) -> dict[str, float]:
    """Loss, and by how much the peak of resident memory grew in three steps."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(artifact), str(logits_bytes)],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))
