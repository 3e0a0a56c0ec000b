"""ONNX Runtime Training: what is refused and why, and, in its own environment, the same steps and curves as torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import plain_models
import pytest
import torch
import transformers
from anywhere import ORT_PYTHON, open_anywhere
from paths import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from pretrained import MINILM, shared_data
from safetensors import safe_open

from fleetune.device_runtime.arrays import Arrays, load_arrays, save_arrays
from fleetune.device_runtime.commands.inspect import estimate, inspect
from fleetune.device_runtime.commands.selfcheck import relative_error, selfcheck
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.graph_file import graph_problems
from fleetune.device_runtime.contracts.ort_training_layout import LAYOUT
from fleetune.device_runtime.contracts.plans import Mode, dropping
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.errors import ConfigError, ExportError
from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.golden import torch_step
from fleetune.exporters.model.program import Program, trainable_names
from fleetune.exporters.ort_training.graphs import OPSET, depth_graph
from fleetune.exporters.ort_training.writing import PYTHON, write_ort_training
from fleetune.exporters.writing import Description
from fleetune.toolkit.export import export
from fleetune.toolkit.programs import describe, program_of

WORKER = ROOT / "tests" / "support" / "ort_training_worker.py"
DESCRIPTION = Description("tiny", "Tiny", "sequence-classification", tuple("abcde"), {})
DROP, FORWARD, TRAIN = Mode.DROP, Mode.FORWARD, Mode.TRAIN
LAYERS = 4


def own_environment(test: Any) -> Any:
    reason = "no .venv-ort; make it with `make ort-env`"
    return pytest.mark.slow(pytest.mark.skipif(not ORT_PYTHON.is_file(), reason=reason)(test))


def tiny_bert() -> Program:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 3}
    config = transformers.BertConfig(
        vocab_size=101, num_hidden_layers=LAYERS, max_position_embeddings=64, **sizes
    )
    return tiny(transformers.BertForSequenceClassification, config, "sequence-classification", "SEQ_CLS")


def tiny_gpt2() -> Program:
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=101, n_embd=32, n_layer=LAYERS, n_head=2, n_positions=64, **ids
    )
    return tiny(transformers.GPT2LMHeadModel, config, "causal-lm", "CAUSAL_LM")


def tiny(kind: Any, config: Any, task: str, peft_task: str) -> Program:
    """A random model whose LoRA is no longer at its start, where half of the gradients are zero."""
    torch.manual_seed(0)
    config.use_cache, config._attn_implementation = False, "eager"
    model = get_peft_model(kind(config), LoraConfig(task_type=peft_task, r=4, lora_alpha=8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return program_of(describe(model, None, task=task, source="tiny"), task=task)


MODELS = {"bert": tiny_bert, "gpt2": tiny_gpt2}


@pytest.fixture(scope="module", params=list(MODELS))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, Path]:
    program, folder = MODELS[request.param](), tmp_path_factory.mktemp(request.param) / "artifact"
    write_ort_training(program, DESCRIPTION, folder)
    return program, folder


def in_own_environment(what: str, artifact: Path, folder: Path, **asked: Any) -> tuple[Arrays, Any]:
    arrays = asked.pop("arrays", {})
    save_arrays(folder / "in", arrays, metadata={"asked": json.dumps(asked)})
    command = [ORT_PYTHON, WORKER, what, artifact, folder / "in", folder / "out"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with safe_open(folder / "out", "np") as file:
        return load_arrays(folder / "out"), json.loads(file.metadata()["answer"])


def numbered(batches: list[dict[str, torch.Tensor]]) -> Arrays:
    return {f"{i}.{n}": a.numpy() for i, batch in enumerate(batches) for n, a in batch.items()}


@pytest.mark.parametrize("model", MODELS)
def test_only_what_learns_is_in_the_forward_graph(model: str, tmp_path: Path) -> None:
    program = MODELS[model]()
    graph = depth_graph(program, find_anatomy(program, batch=3, seq=37), depth=2)
    made = onnx.load_from_string(graph.content)
    assert made.opset_import[0].version == OPSET
    assert {row.name for row in made.graph.initializer} == set(graph.trained)
    learning = set(trainable_names(program.module))
    assert set(graph.trained.values()) == {n for n in learning if not any(f".{i}." in n for i in (2, 3))}
    assert not set(graph.frozen.values()) & learning
    assert len(graph.content) < 150_000
    (tmp_path / "forward.onnx").write_bytes(graph.content)
    assert [*graph_problems(tmp_path / "forward.onnx")] == []


def test_a_missing_environment_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, str(tmp_path / "python"))
    with pytest.raises(ExportError, match=r"python is missing; run: .*onnxruntime-training-cpu==1\.19\.2"):
        write_ort_training(plain_models.program(plain_models.Classifier((0.2,))), DESCRIPTION, tmp_path / "a")


def test_a_wrong_environment_names_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)  # has the inference build of onnxruntime only
    with pytest.raises(ExportError, match=r"onnxruntime\.training.*needs: .*onnxruntime-training-cpu"):
        write_ort_training(plain_models.program(plain_models.Classifier((0.2,))), DESCRIPTION, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"depths": [0, 3]}, ExportError, "depths 0, 3: the model has 1 to 2 layers"),
        ({"base_dtype": "int8"}, ExportError, "ort-training runtime does not take it"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)
    program = plain_models.program(plain_models.Classifier((0.2, 0.2)))
    with pytest.raises(error, match=message):
        write_ort_training(program, DESCRIPTION, tmp_path / "a", **options)


def test_blocks_that_cannot_take_each_others_places_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)
    program = plain_models.program(plain_models.Classifier((0.2, 0.9)))
    with pytest.raises(ExportError, match="blocks has 2 kinds of block"):
        write_ort_training(program, DESCRIPTION, tmp_path / "a")


@own_environment
def test_where_the_training_build_is_missing_the_artifact_says_so(exported: tuple[Program, Path]) -> None:
    with pytest.raises(ConfigError, match=r"environment of its own.*onnxruntime-training-cpu==1\.19\.2"):
        selfcheck(exported[1])


@own_environment
def test_the_frozen_weights_are_there_once(exported: tuple[Program, Path]) -> None:
    manifest = open_artifact(exported[1]).manifest
    assert LAYOUT in manifest.files
    names = [
        f"graphs/depth{d}/{n}" for d in range(1, LAYERS + 1) for n in ("checkpoint", "training_model.onnx")
    ]
    assert set(names) <= manifest.files.keys()
    adapter = manifest.files["adapter.safetensors"].size_bytes
    assert all(manifest.files[n].size_bytes < adapter + 10_000 for n in names if n.endswith("checkpoint"))


@own_environment
def test_memory_is_not_guessed(exported: tuple[Program, Path]) -> None:
    artifact = open_artifact(exported[1])
    assert inspect(exported[1]).estimates == []
    with pytest.raises(ConfigError, match="cannot be estimated"):
        estimate(artifact, dropping(LAYERS, ()), name="full", batch_size=1, seq_len=8)


@own_environment
def test_selfcheck_from_the_command_line(exported: tuple[Program, Path]) -> None:
    command = [str(ORT_PYTHON.with_name("fleetune")), "selfcheck", str(exported[1]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["max_relative_error"] < 1e-5


@own_environment
def test_steps_at_other_sizes_and_plans_equal_torch(exported: tuple[Program, Path], tmp_path: Path) -> None:
    program, artifact = exported
    anatomy = find_anatomy(program, batch=3, seq=37)
    batches = [program.make_batch(*sizes) for sizes in ((2, 9), (5, 24), (1, 40), (2, 9))]
    plans = [dropping(LAYERS, d) for d in ((), (0, 2), (3, 1, 0))] + [(DROP, FORWARD, TRAIN, TRAIN)]
    found, _ = in_own_environment("steps", artifact, tmp_path, arrays=numbered(batches), plans=plans)
    for i, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        dropped = [layer for layer, mode in enumerate(plan) if mode is DROP]
        expected = torch_step(program, anatomy, batch, dropped=dropped)
        if FORWARD in plan:
            frozen = f".{plan.index(FORWARD)}."
            expected = {n: t for n, t in expected.items() if frozen not in n}
        mine = {n.removeprefix(f"{i}."): a for n, a in found.items() if n.startswith(f"{i}.")}
        assert mine.keys() == expected.keys()
        errors = {
            n: relative_error(a.reshape(expected[n].shape), expected[n].numpy()) for n, a in mine.items()
        }
        assert max(errors.values()) < 1e-4, errors
    np.testing.assert_array_equal(found["predicted"], found["0.logits"])


@own_environment
def test_a_batch_of_which_no_label_counts_teaches_nothing(exported: tuple[Program, Path]) -> None:
    program, folder = exported
    artifact = open_artifact(folder)
    batch = {n: t.numpy() for n, t in program.make_batch(2, 9).items()}
    if artifact.manifest.counted:
        batch["labels"] = np.full_like(batch["labels"], artifact.manifest.counted.ignored)
    with open_anywhere(artifact) as engine:
        step = engine.step(batch, dropping(LAYERS, ()), artifact.adapter())
        loss, _ = engine.evaluate(batch, artifact.adapter())
    teaches = artifact.manifest.counted is None
    assert (step.loss > 0, loss > 0) == (teaches, teaches)
    assert {bool(grad.any()) for grad in step.grads.values()} == {teaches}


@own_environment
def test_its_own_optimizer_trains_the_positions_of_a_fixed_plan(
    exported: tuple[Program, Path], tmp_path: Path
) -> None:
    program, artifact = exported
    batch, plan, lr = program.make_batch(4, 16), dropping(LAYERS, (1,)), 1e-3
    arrays = numbered([batch])
    found, answer = in_own_environment("fixed", artifact, tmp_path, arrays=arrays, plan=plan, steps=3, lr=lr)
    start = open_artifact(artifact).adapter()
    losses, adapter = adamw_before_correction(program, batch, steps=3, lr=lr)
    np.testing.assert_allclose(answer["losses"], losses, rtol=1e-5)
    assert found.keys() == adapter.keys()
    errors = {n: relative_error(found[n] - start[n], adapter[n] - start[n]) for n in adapter}
    assert max(errors.values()) < 1e-2, errors
    untouched = {n for n in found if np.array_equal(found[n], start[n])}
    assert untouched == {n for n in found if ".1." in n}


def adamw_before_correction(
    program: Program, batch: Any, *, steps: int, lr: float
) -> tuple[list[float], Arrays]:
    """Losses and the adapter after steps of onnxruntime's AdamW: it adds epsilon before it corrects the bias, torch after."""
    named = {n: p for n, p in program.module.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in named.items()}
    anatomy = find_anatomy(program, batch=3, seq=37)
    m, v, losses = {}, {}, []
    with torch.no_grad():
        for t in range(1, steps + 1):
            made = torch_step(program, anatomy, batch, dropped=[1])
            losses.append(made["loss"].item())
            for name, p in named.items():
                if (g := made.get(f"grad.{program.names[name]}")) is None:
                    continue
                m[name] = 0.9 * m.get(name, 0) + 0.1 * g
                v[name] = 0.999 * v.get(name, 0) + 0.001 * g * g
                rate = lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
                p.sub_(rate * m[name] / (v[name].sqrt() + 1e-8))
        after = {program.names[n]: p.numpy().copy() for n, p in named.items()}
        for name, p in named.items():
            p.copy_(before[name])
    return losses, after


@own_environment
@pytest.mark.shared_data
def test_fifty_losses_of_minilm_with_half_of_the_layers_dropped_equal_torch_and_peft(tmp_path: Path) -> None:
    data, folder, steps, lr = shared_data("banking77") / "train.jsonl.gz", tmp_path / "artifact", 50, 2e-3
    export(MINILM, task="sequence-classification", num_labels=77, out=folder, backend="ort-training")
    artifact = open_artifact(folder)
    save_peft(tmp_path / "start", artifact.manifest, artifact.adapter())
    work = {"steps": steps, "batch_size": 16, "seed": 7}
    adapter, answer = in_own_environment("train", folder, tmp_path, data=str(data), work=work, lr=lr)
    rows = load_dataset(data, artifact.manifest, folder, seq_len=48)
    batches = [rows.rows(chosen) for chosen in rows.epoch_batches(7, 0, 16)[:steps]]
    model = peft_minilm(tmp_path / "start")
    expected = torch_losses(model, batches, answer["plans"], lr)
    np.testing.assert_allclose(answer["losses"], expected, atol=1e-2, rtol=0)
    assert np.ptp(expected) > 0.1
    print(
        f"largest difference of {steps} losses: {np.abs(np.subtract(answer['losses'], expected)).max():.1e}"
    )
    save_peft(tmp_path / "trained", artifact.manifest, adapter)
    back = peft_minilm(tmp_path / "trained")
    after = dict(back.named_parameters())
    assert (
        relative_error(
            after["base_model.model.classifier.modules_to_save.default.weight"].detach().numpy(),
            dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"]
            .detach()
            .numpy(),
        )
        < 1e-2
    )


def peft_minilm(adapter: Path) -> Any:
    settings = {"num_labels": 77, "attn_implementation": "eager"}
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(MINILM, **settings)
    return PeftModel.from_pretrained(plain, str(adapter), is_trainable=True).eval()


def torch_losses(model: Any, batches: list[Arrays], plans: list[list[int]], lr: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for batch, plan in zip(batches, plans, strict=True):
        for layer, mode in zip(model.base_model.model.bert.encoder.layer, plan, strict=True):
            layer.__dict__.pop("forward", None)
            if mode == DROP:
                layer.forward = lambda hidden_states, *_, **__: hidden_states
        optimizer.zero_grad()
        loss = model(**{n: torch.from_numpy(a) for n, a in batch.items()}).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
