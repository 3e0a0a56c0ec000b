"""No traceback reaches a user: command lines, folders and files are spoilt by the hundred, and each is told in one line.

A try has a number, and is the same every time: ``FLEETUNE_TRY=1234 pytest tests/test_plain_words.py`` repeats one alone.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from flat import FEW_SAMPLES
from forks import Ended, Forks
from servers import Mosquitto
from simulated import FILE, run
from tries import LINES, STOPPED_AFTER_S, WITH_TORCH, Try, copy_world, draw
from words import write_lines

from fleetune.broker.aggregation import aggregate
from fleetune.broker.jobs.settings import Job
from fleetune.broker.servers.embedded import EmbeddedServer
from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.commands.train import train
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.loading import load_dataset

ONE = os.environ.get("FLEETUNE_TRY")
FEW, MANY, TORCH = 150, 2000, 150
RUNTIME = (
    "fleetune.toolkit.cli",
    "fleetune.device_runtime.commands.train",
    "fleetune.broker.aggregation",
    "fleetune.toolkit.simulation.compare",
    "fleetune.toolkit.simulation.simulate",
    "tokenizers",
    "onnxruntime",
)
EXPORT = (*RUNTIME, "torch", "peft", "transformers", "fleetune.toolkit.export", "fleetune.toolkit.merge")
OURS, NOTE = "fleetune: ", "fleetune: note: "
UNEXPECTED = "a fault of fleetune"


@pytest.fixture(scope="module")
def world(tmp_path_factory, word_artifact):
    """What people have lying about: an artifact, data, settings, runs (one was stopped), a federation, a device's state."""
    folder = tmp_path_factory.mktemp("world") / "w"
    folder.mkdir()
    shutil.copytree(word_artifact, folder / "artifact")
    write_lines(folder / "words.csv")
    lines = [line.split(",") for line in (folder / "words.csv").read_text().splitlines()[1:]]
    (folder / "words.jsonl").write_text("".join(f'{{"text": "{t}", "label": "{c}"}}\n' for t, c in lines))
    manifest = open_artifact(folder / "artifact").manifest
    data = load_dataset(folder / "words.csv", manifest, folder / "artifact", seq_len=16)
    np.savez(folder / "words.npz", **data.rows(np.arange(20)))
    (folder / "settings.toml").write_text(
        "[train]\nlr = 0.01\nbatch_size = 4\npolicy = 'suffix'\ndrop = 0.5\n[rules]\nnice = 0\n"
    )
    (folder / "rules.toml").write_text(
        "nice = 1\nhours = { windows = ['00:00-24:00'] }\nload = { max_share = 1.0 }\n"
    )
    (folder / "logins.txt").write_text("kitchen:$7$101$abc$def\n")
    (folder / "labels.txt").write_text("off\non\n")
    _train(folder)
    _federate(folder)
    _simulate(folder)
    return folder


def _train(folder):
    work = LocalWork(steps=4, batch_size=4)
    train(folder / "artifact", data=folder / "words.csv", out=folder / "run", work=work)

    def stop(report):
        if len(seen := [*seen_steps, report]) == 3:
            raise KeyboardInterrupt
        seen_steps[:] = seen

    seen_steps = []
    longer = LocalWork(steps=6, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        train(
            folder / "artifact",
            data=folder / "words.csv",
            out=folder / "stopped",
            work=longer,
            checkpoint_every=1,
            on_step=stop,
        )


def _federate(folder):
    with EmbeddedServer() as server, ThreadPoolExecutor() as pool:
        own = {
            "data": folder / "words.csv",
            "mqtt": server.url,
            "job": "home",
            "id": "kitchen",
            "state": folder / "state",
            "terms": FEW_SAMPLES,
        }
        pool.submit(device, folder / "artifact", **own)
        job = Job("home", rounds=2, clients=1)
        aggregate(
            folder / "artifact", mqtt=server.url, job=job, work=LocalWork(steps=2), out=folder / "federation"
        )


def _simulate(folder):
    """Two runs of one file, and what a step of each costs."""
    text = FILE.format(artifact="artifact").replace("test.csv", "train.csv").replace("train.csv", "words.csv")
    text = text.replace('name = "tiny"', 'name = "tiny"\ntimings = "timings.json"').replace(
        "rounds = 3", "rounds = 1"
    )
    (folder / "simulation.toml").write_text(text)
    for name, policy in (("tiny", "full"), ("head", "head")):
        run(folder / "simulation.toml", f"runs/{name}-0", f"name={name}", f"work.policy.name={policy}")


def _save_model(folder):
    """A model of two layers with a tokenizer of words, and a LoRA of it."""
    import peft
    import transformers

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    }
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=32, num_labels=2, **sizes)
    )
    model.save_pretrained(folder / "model")
    shutil.copy(folder / "artifact" / "tokenizer.json", folder / "model")
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "model" / "tokenizer.json"), **names
    ).save_pretrained(folder / "model")
    learning = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    learning.save_pretrained(folder / "adapter")


def problem_of(ended: Ended) -> str:
    """What a user must not see; empty if there is none."""
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith(NOTE)]
    if "Traceback" in ended.err + ended.out or '  File "' in ended.err:
        return "a traceback"
    if ended.code not in (0, 1, 2, 143, -15):
        return f"exit code {ended.code}"
    if ended.code == 1 and (
        len([x for x in lines if x.startswith(OURS)]) != 1 or not lines[-1].startswith(OURS)
    ):
        return "not told in one line of ours"
    if ended.code == 1 and UNEXPECTED in lines[-1]:
        return "an error that is none of ours"
    if ended.code == 2 and not lines:
        return "no word"
    return ""


def judge(forks: Forks, drawn: Try, folder: Path) -> str:
    ended = forks.run(*drawn.words, cwd=folder, stop_after_s=STOPPED_AFTER_S.get(drawn.line, 60))
    problem = problem_of(ended)
    return f"{drawn}: {problem}; exit {ended.code}\n{ended.err[-1500:]}" if problem else ""


def try_all(numbers, lines, world, tmp_path, modules) -> list[str]:
    """The problems of so many tries, on every core that there is."""
    with ExitStack() as stack:
        url = stack.enter_context(Mosquitto(tmp_path)).url
        cores = os.cpu_count() or 1
        forks = [stack.enter_context(Forks(*modules)) for _ in range(min(cores, len(numbers)))]

        def share(part: int) -> list[str]:
            found = []
            for number in numbers[part :: len(forks)]:
                folder = copy_world(world, tmp_path / str(number))
                found.append(judge(forks[part], draw(number, lines, folder, url=url), folder))
                shutil.rmtree(folder)
            return found

        with ThreadPoolExecutor(len(forks)) as pool:
            return [problem for found in pool.map(share, range(len(forks))) for problem in found if problem]


def numbers(count: int) -> list[int]:
    return [int(ONE)] if ONE else list(range(count))


def test_a_few_tries_are_told_in_plain_words(world, tmp_path):
    problems = try_all(numbers(FEW), LINES, world, tmp_path, RUNTIME)
    assert not problems, "\n".join([*problems[:5], f"{len(problems)} in all"])


@pytest.mark.slow
def test_many_tries_are_told_in_plain_words(world, tmp_path):
    problems = try_all(numbers(MANY)[FEW if not ONE else 0 :], LINES, world, tmp_path, RUNTIME)
    assert not problems, "\n".join([*problems[:20], f"{len(problems)} in all"])


@pytest.mark.slow
def test_tries_of_what_needs_torch_are_told_in_plain_words(world, tmp_path):
    _save_model(world)
    problems = try_all(numbers(TORCH), WITH_TORCH, world, tmp_path, EXPORT)
    assert not problems, "\n".join([*problems[:10], f"{len(problems)} in all"])


def test_what_a_user_must_not_see_is_seen():
    assert (
        problem_of(Ended(1, "", 'Traceback (most recent call last):\n  File "x"\nKeyError: 1'))
        == "a traceback"
    )
    assert problem_of(Ended(-11, "", "")) == "exit code -11"
    assert problem_of(Ended(1, "", "boom")) == "not told in one line of ours"
    assert (
        problem_of(Ended(1, "", "fleetune: unexpected KeyError: 1; this is a fault of fleetune"))
        == "an error that is none of ours"
    )
    assert problem_of(Ended(1, "", "fleetune: words.csv: no such file")) == ""
