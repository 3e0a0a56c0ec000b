"""The whole product in one file, in memory and without torch: an artifact, devices, an aggregator, and the adapter they make."""

from functools import partial

import msgspec
import numpy as np
from fleet import Aggregator, Device, World
from safetensors.numpy import load
from words import write_lines

from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.commands.predict import predict
from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.commands.train import train
from fleetune.device_runtime.contracts.adapters import load_peft, save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.training.machine import Machine, Resources

TEXTS = ["red blue", "dog cow hen cat dog", "drill"]
WORK = LocalWork(
    policy=PolicySpec(name="exact-k", drop=0.25),
    optimizer=OptimizerSpec(lr=0.02),
    epochs=1,
    batch_size=8,
    seq_len=16,
    codec="int8",
)


def answers(artifact, adapter):
    return [found.label for found in predict(artifact, text=TEXTS, adapter=adapter, threads=1)]


def test_one_device_trains_alone_and_knows_what_it_learned(word_artifact, tmp_path):
    assert selfcheck(word_artifact, threads=1).ok
    data = write_lines(tmp_path / "words.csv")
    report = train(
        word_artifact,
        data=data,
        eval=write_lines(tmp_path / "others.csv", seed=9),
        out=tmp_path / "run",
        work=LocalWork(optimizer=OptimizerSpec(lr=0.02), epochs=6, batch_size=8, seq_len=16),
        resources=Resources(threads=1),
    )
    assert report.accuracy > 0.9
    assert answers(word_artifact, tmp_path / "run" / "adapter") == ["a", "b", "c"]


def test_two_devices_and_an_aggregator_make_an_adapter_that_knows_what_both_saw(word_artifact, tmp_path):
    """The first has lines of the first two groups, the second of the last two; only updates leave them."""
    artifact = open_artifact(word_artifact)
    made = federated(artifact, tmp_path, WORK, rounds=5)
    start = artifact.adapter()
    assert made.keys() == start.keys()
    assert any(not np.array_equal(made[name], start[name]) for name in start)
    save_peft(tmp_path / "adapter", artifact.manifest, made)
    assert answers(word_artifact, tmp_path / "adapter") == ["a", "b", "c"]


def test_devices_that_keep_layers_have_models_of_their_own(word_artifact, tmp_path):
    """Each knows the two groups that it saw; the kept layers of the global adapter are as they were, or another's."""
    artifact = open_artifact(word_artifact)
    made = federated(artifact, tmp_path, msgspec.structs.replace(WORK, personal=2), rounds=5)
    mine = [load_peft(tmp_path / f"own-{number}", artifact.manifest) for number in (0, 1)]
    differ = [{n for n in made if not np.array_equal(made[n], own[n])} for own in mine]
    assert all(differ)
    assert answers(word_artifact, tmp_path / "own-0")[:2] == ["a", "b"]
    assert answers(word_artifact, tmp_path / "own-1")[1:] == ["b", "c"]


def federated(artifact, tmp_path, work, *, rounds):
    """The adapter that two devices make; their own ones, if they keep layers, are in ``own-0`` and ``own-1``."""
    server, start = Loopback(), artifact.adapter()

    def workbench(machine, number):
        path = write_lines(tmp_path / f"{number}.csv", seed=number, groups=(number, number + 1))
        data = load_dataset(path, artifact.manifest, artifact.folder, seq_len=work.seq_len)
        return Workbench(
            lambda work, adapter: machine.trainer(data, work, adapter),
            lambda work, adapter: machine.evaluate(data, adapter),
            data.num_samples,
            keep=partial(save_peft, tmp_path / f"own-{number}", artifact.manifest),
        )

    with Machine(artifact, Resources(threads=1), folder=tmp_path / "cache") as machine:
        settings = {
            "clients": 2,
            "min_clients": 2,
            "rounds": rounds,
            "artifact": artifact.digest,
            "work": work,
        }
        aggregator = Aggregator(server, tmp_path, adapter=start, **settings).start()
        devices = [
            Device(
                server,
                tmp_path,
                number,
                workbench=workbench(machine, number),
                artifact=artifact.digest,
                adapter=FirstAdapter.of(start),
            ).start()
            for number in (0, 1)
        ]
        World(server, aggregator, devices).run()
    return load(aggregator.version(rounds))
