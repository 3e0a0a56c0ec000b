"""Every architecture x task x backend against torch, at sizes that were not traced; the table in the docs says the same."""

from pathlib import Path

import pytest
from anywhere import ORT_PYTHON, selfcheck_anywhere
from architecture_table import NOT_MEASURED, Key, read_table, record
from architectures import (
    CASES,
    CAUSAL,
    IMAGE,
    SEQUENCE,
    TOKEN,
    errors_at_sizes,
    export_folder,
    export_tiny,
    save_tiny,
    torch_program,
)
from hugging_face import errors_against_peft

from fleetune.device_runtime.arrays import load_arrays
from fleetune.device_runtime.commands.selfcheck import LIMIT, recorded_adapter
from fleetune.device_runtime.contracts.artifact import GOLDEN, open_artifact
from fleetune.device_runtime.errors import ExportError

FAST = [("qwen2", CAUSAL), ("bert", TOKEN)]
FAST += [
    pytest.param(name, task, marks=pytest.mark.slow) for name, task in (("vit", IMAGE), ("gpt2", SEQUENCE))
]
EXECUTORCH = [("bert", SEQUENCE), ("llama", CAUSAL), ("qwen2", CAUSAL), ("gpt2", CAUSAL), ("vit", IMAGE)]
EXECUTORCH += [(name, CAUSAL) for name in ("qwen3", "gemma3", "smollm3", "phi", "mixtral")]
EXECUTORCH += [(name, SEQUENCE) for name in ("roberta", "distilbert", "albert", "deberta-v2", "modernbert")]
ORT_TRAINING = [
    (name, CAUSAL) for name in ("llama", "qwen2", "qwen3", "phi", "gpt2", "mixtral", "gemma3", "smollm3")
]
ORT_TRAINING += [
    (name, SEQUENCE) for name in ("bert", "roberta", "distilbert", "albert", "deberta-v2", "modernbert")
]
ORT_TRAINING += [("vit", IMAGE), ("bert", TOKEN)]
CASES_OF = {"onnx": CASES, "executorch": EXECUTORCH, "ort-training": ORT_TRAINING}
KEYS = [(*case, backend) for backend, cases in CASES_OF.items() for case in cases]


def outcome_of(key: Key, folder: Path) -> str:
    """The largest error, or the reason of the refusal."""
    name, task, backend = key
    try:
        artifact = export_tiny(name, task, folder, backend=backend)
    except ExportError as refusal:
        return f"refused: {refusal}".replace("|", "/").replace(f"{folder / 'model'}: ", "")
    errors = errors_at_sizes(artifact, torch_program(folder / "model", task))
    opened = open_artifact(artifact, verify=False)
    adapter = recorded_adapter(opened, load_arrays(artifact / GOLDEN))
    errors |= errors_against_peft(opened, adapter, folder / "model")
    return f"{max(selfcheck_anywhere(artifact), *errors.values()):.1e}"


@pytest.mark.parametrize(("name", "task"), FAST)
def test_a_few_architectures_equal_torch(name: str, task: str, tmp_path: Path) -> None:
    assert float(outcome_of((name, task, "onnx"), tmp_path)) <= LIMIT
    head = open_artifact(tmp_path / "artifact", verify=False).manifest.head
    assert (head.targets is not None) == (task == CAUSAL)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS, ids=[" ".join(key) for key in KEYS])
def test_every_architecture_does_what_the_table_says(key: Key, tmp_path: Path) -> None:
    if key[2] == "ort-training" and not ORT_PYTHON.is_file():
        pytest.skip("no .venv-ort; make it with `make ort-env`")
    outcome = outcome_of(key, tmp_path)
    record(key, outcome)
    expected = read_table().get(key, NOT_MEASURED)
    if outcome.startswith("refused"):
        assert expected in (outcome, NOT_MEASURED)
    else:
        assert float(outcome) <= LIMIT
        assert not expected.startswith("refused")


def test_the_table_has_a_row_for_every_case() -> None:
    assert read_table().keys() == set(KEYS)


def test_a_model_in_stages_is_refused_with_the_list_that_was_taken(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"before the blocks cannot learn.* and \d+ more; the blocks are those of .*swin"
    ):
        export_tiny("swin", IMAGE, tmp_path)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_decoder_is_refused_as_one(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, SEQUENCE, tmp_path / "model")
    with pytest.raises(ExportError, match="is an encoder-decoder, two stacks of blocks"):
        export_folder(model, SEQUENCE, tmp_path / "artifact")
