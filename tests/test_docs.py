"""The Python of docs/cli.md does what it says: it is run, from top to bottom, in a folder of its own."""

import json
import re

import pytest
import torch
import transformers
from paths import ROOT
from peft import PeftModel
from pretrained import MINILM

import fleetune
from fleetune.toolkit.commands.options import AGGREGATE, DEMO, DEVICE, GENERATE, PREDICT, TRAIN
from fleetune.toolkit.flags import claimed

PAGE = (ROOT / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the page takes for granted: a model, and data."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=30522, max_position_embeddings=64, num_labels=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "MODEL")
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path / "MODEL")
    for name in ("mine", "held-out", "kitchen", "hall"):
        lines = [{"text": f"turn the light {word}", "label": word} for word in ("on", "off") * 48]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run_one_after_the_other(folder, capsys):
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        exec(block, {})
    single, label, federation = capsys.readouterr().out.strip().splitlines()
    assert float(single.split()[0]) > 0
    assert re.search("label='(on|off)'", label)
    assert federation.split()[0] == "5"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "MODEL")
    PeftModel.from_pretrained(model, folder / "adapter")
    assert (folder / "run-home" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_page_names_every_field_that_is_a_flag():
    table = PAGE[PAGE.index("## Options are fields") : PAGE.index("## What all commands share")]
    for parts in (TRAIN, PREDICT, GENERATE, DEVICE, AGGREGATE, DEMO):
        for name, (_, flag) in claimed(parts).items():
            words = (f"`{flag.path[-1]}`", f"`--{name.replace('_', '-')}`")
            assert any(word in table for word in words), name


def test_the_page_names_no_function_that_is_not_there():
    for name in re.findall(r"`fleetune\.(?!py`|json`)(\w+)`", PAGE):
        assert hasattr(fleetune, name), name
