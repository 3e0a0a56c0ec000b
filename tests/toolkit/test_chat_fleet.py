"""Eight devices with chats, and one that measures, teach a language model over real MQTT servers; it answers chats then."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chats import chat_model, chat_tokenizer, threads, write_chats
from flat import aggregate, device
from make_chat_artifact import FOLDER, TARGETS
from peft import PeftModel
from safetensors.torch import load_file

from fleetune.broker.servers.embedded import EmbeddedServer
from fleetune.device_runtime.commands.generate import Generation, generate
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.methods.sampling import Sampling
from fleetune.toolkit.export import export
from fleetune.toolkit.merge import merge

DEVICES, CHATS, ROUNDS = 8, 8, 3
WORK = {"rounds": ROUNDS, "clients": DEVICES, "local_steps": 3, "batch_size": 4, "seq_len": 192, "lr": 0.05}
SAID = "turn the lamp on in the hall, please: 3"


def federate(url: str, folder: Path) -> Path:
    """Run a fleet of threads; the run's folder. The phones come when the judge has measured version 0: else it may be late."""
    chats, options = threads(DEVICES * CHATS + 10), {"mqtt": url, "job": "chats"}
    phones: list[Future[Any]] = []
    with ThreadPoolExecutor(DEVICES + 1) as pool:

        def begin(name: str, mine: Any, **more: Any) -> Future[Any]:
            data, state = write_chats(folder / f"{name}.jsonl", mine), folder / name
            return pool.submit(
                device, FOLDER, **options, data=data, id=name, state=state, threads=1, idle_limit_s=30, **more
            )

        def join(_event: object) -> None:
            if not phones:
                phones.extend(begin(f"phone-{i}", chats[i * CHATS : (i + 1) * CHATS]) for i in range(DEVICES))

        judge = begin("judge", chats[DEVICES * CHATS :], role="evaluate", on_event=join)
        aggregate(FOLDER, **options, out=folder / "run", **WORK)
        assert [phone.result(60).rounds for phone in phones] == [ROUNDS] * DEVICES
        judge.result(60)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What eight devices have made over the embedded server."""
    with EmbeddedServer() as server:
        return federate(server.url, tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the artifact was exported from, whatever torch draws today."""
    folder = chat_model(tmp_path_factory.mktemp("model") / "chatty")
    artifact, plain = open_artifact(FOLDER), transformers.AutoModelForCausalLM.from_pretrained(folder)
    frozen = {t.name: artifact.base(t).copy() for t in artifact.manifest.tensors if t.file == "base"}
    parameters = dict(plain.named_parameters())
    for name, values in frozen.items():
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain_name in parameters:  # others are made anew, as the rotary frequencies
            parameters[plain_name].data = torch.from_numpy(values)
    plain.save_pretrained(folder)
    return folder


def answered(artifact: Path, adapter: Path | None) -> Generation:
    return generate(
        artifact,
        prompt=SAID,
        chat=True,
        adapter=adapter,
        sampling=Sampling(max_tokens=24),
        on_note=lambda _: None,
    )


def by_transformers(model: Any) -> list[int]:
    """The same, greedily, by transformers."""
    asked = [{"role": "user", "content": SAID}]
    ids = chat_tokenizer("marked").apply_chat_template(
        asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = model.generate(**ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
    found: list[int] = made[0, ids["input_ids"].shape[1] :].tolist()
    return found


def test_a_fleet_of_chats_lowers_the_loss_of_answers_that_it_never_saw(run: Path) -> None:
    history = json.loads((run / "run.json").read_text())["report"]["history"]
    assert [row["devices"] for row in history] == [0, *[DEVICES] * ROUNDS]
    losses = [row["loss"] for row in history]
    assert [row["perplexity"] for row in history] == pytest.approx([exp(loss) for loss in losses])
    assert {row["score"] for row in history} == {"perplexity"}
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    measured = [
        json.loads(line) for line in (run.parent / "judge/evaluations.jsonl").read_text().splitlines()
    ]
    assert [row["loss"] for row in measured] == pytest.approx(losses)
    assert measured[-1]["perplexity"] == pytest.approx(exp(losses[-1]))


def test_mosquitto_and_the_embedded_server_make_the_same_adapter(
    run: Path, mosquitto: Any, tmp_path: Path
) -> None:
    other = federate(mosquitto.url, tmp_path)
    found, wanted = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (other, run))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_the_adapter_answers_on_the_device_as_in_peft_and_merged(
    run: Path, model: Path, tmp_path: Path
) -> None:
    found = answered(FOLDER, run)
    assert found.ids != answered(FOLDER, None).ids
    adapter = merge(run, out=tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert by_transformers(PeftModel.from_pretrained(plain, adapter).eval()) == found.ids
    merged = merge(run, out=tmp_path / "merged", full=True, model=model)
    assert by_transformers(transformers.AutoModelForCausalLM.from_pretrained(merged).eval()) == found.ids


@pytest.mark.slow  # a model is exported
def test_the_merged_model_answers_as_an_artifact_of_its_own(run: Path, model: Path, tmp_path: Path) -> None:
    merged = merge(run, out=tmp_path / "merged", full=True, model=model)
    export(merged, task="causal-lm", out=tmp_path / "again", target_modules=TARGETS)
    assert answered(tmp_path / "again", None).ids == answered(FOLDER, run).ids
