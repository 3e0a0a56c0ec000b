"""Makes tests/data/chat_artifact anew: a random Llama of two layers, a byte-level tokenizer, a chat template that marks answers.

Usage, from the checkout: ``python tests/support/make_chat_artifact.py``. It needs torch; the tests that read it do not.
"""

import tempfile
from pathlib import Path

from chats import chat_model
from paths import DATA

from fleetune.device_runtime.contracts.artifact import MANIFEST
from fleetune.toolkit.export import export

FOLDER = DATA / "chat_artifact"
TARGETS = ["q_proj", "v_proj"]


def make(out: Path) -> None:
    """Export into the folder ``out``; the same versions give the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model = chat_model(Path(folder) / "chatty")
        export(model, task="causal-lm", out=out, target_modules=TARGETS, lora_r=4, lora_alpha=8)
        manifest = out / MANIFEST
        manifest.write_text(manifest.read_text().replace(str(model), model.name))


if __name__ == "__main__":
    make(FOLDER)
