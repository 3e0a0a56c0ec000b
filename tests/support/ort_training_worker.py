"""Runs in the environment of onnxruntime-training, as a script: what a test asks of an artifact, in files.

Usage: ort_training_worker.py steps|fixed|train ARTIFACT IN OUT, where IN and OUT are safetensors files with metadata.
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open

from fleetune.device_runtime.arrays import Arrays, load_arrays, save_arrays
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, active_layers
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.ort_training import OrtTrainingEngine
from fleetune.device_runtime.training.trainer import Trainer


def steps(artifact: Artifact, asked: dict, given: Arrays) -> tuple[Arrays, dict]:
    """One step per plan of ``asked``, on the batch of its number."""
    out: Arrays = {}
    with open_engine(artifact) as engine:
        for i, modes in enumerate(asked["plans"]):
            result = engine.step(part(given, f"{i}."), tuple(map(Mode, modes)), artifact.adapter())
            out |= {f"{i}.grad.{n}": g for n, g in result.grads.items()}
            out |= {f"{i}.loss": as_array(result.loss), f"{i}.logits": result.logits}
        batch = {n: a for n, a in part(given, "0.").items() if n != "labels"}
        out["predicted"] = engine.predict(batch, artifact.adapter())
    return out, {}


def fixed(artifact: Artifact, asked: dict, given: Arrays) -> tuple[Arrays, dict]:
    """Steps of ONNX Runtime's own optimizer on one batch and plan."""
    plan = tuple(map(Mode, asked["plan"]))
    batches = [part(given, "0.")] * asked["steps"]
    with open_engine(artifact) as engine:
        losses, adapter = train_fixed_plan(engine, batches, plan, adapter=artifact.adapter(), lr=asked["lr"])
    return adapter, {"losses": losses}


def train_fixed_plan(
    engine: OrtTrainingEngine, batches: list[Arrays], plan: LayerPlan, *, adapter: Arrays, lr: float
) -> tuple[list[float], Arrays]:
    """Steps of ONNX Runtime's own Module and Optimizer on one plan; the losses, and the adapter after them."""
    layers = active_layers(plan)
    module = engine.module(len(layers))
    module.write(engine, adapter, layers)
    optimizer = module.optimizer()
    optimizer.set_learning_rate(lr)
    losses = []
    for batch in batches:
        losses.append(module.run(engine, engine.scope(batch), layers, training=True)[0])
        optimizer.step()
    return losses, {**adapter, **module.read(engine, layers)}


def train(artifact: Artifact, asked: dict, given: Arrays) -> tuple[Arrays, dict]:
    """A run of the ordinary trainer under exact-k."""
    data = load_dataset(Path(asked["data"]), artifact.manifest, artifact.folder, seq_len=48)
    policy = PolicySpec(name="exact-k", drop=0.5)
    work = LocalWork(policy=policy, optimizer=OptimizerSpec(lr=asked["lr"]), **asked["work"])
    plans = []
    with open_engine(artifact) as engine:
        real = engine.step
        engine.step = lambda batch, plan, adapter, **given: (
            plans.append(plan),
            real(batch, plan, adapter, **given),
        )[1]
        trainer = Trainer(engine, data, work, artifact.adapter())
        losses = [trainer.step().loss for _ in range(trainer.total_steps)]
    return trainer.adapter, {"losses": losses, "plans": plans}


def part(arrays: Arrays, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def as_array(number: float):
    import numpy as np

    return np.float32(number).reshape(1)


if __name__ == "__main__":
    what, folder, source, target = sys.argv[1:]
    with safe_open(source, "np") as file:
        asked = json.loads((file.metadata() or {})["asked"])
    arrays, answer = {"steps": steps, "fixed": fixed, "train": train}[what](
        open_artifact(folder), asked, load_arrays(Path(source))
    )
    save_arrays(Path(target), arrays, metadata={"answer": json.dumps(answer)})
