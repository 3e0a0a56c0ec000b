"""Trains on ``onnxruntime-training-cpu`` 1.19.2: a step runs the model of its plan's depth on the active layers' weights.

That package shadows ``onnxruntime`` and therefore has an environment of its own (``make ort-env``).
"""

from typing import Any

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Floats, Indices
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.ort_training_layout import (
    CHECKPOINT,
    EVAL,
    INSTALL,
    OPTIMIZER,
    TRAINING,
    DepthModel,
    read_layout,
    row_of,
)
from fleetune.device_runtime.contracts.plans import LayerPlan, active_layers, full, trained_layers
from fleetune.device_runtime.engine.batches import StepResult, check_batch
from fleetune.device_runtime.engine.decoding import Decoding, Recomputed, check_generates
from fleetune.device_runtime.engine.engine import OfRow, Setup
from fleetune.device_runtime.engine.gates import Gates
from fleetune.device_runtime.engine.hidden_cache import OpenRows
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.engine.loaders import check_cpu
from fleetune.device_runtime.engine.onnx_graphs import Value, array_of, check_threads, told, value_of
from fleetune.device_runtime.engine.pulls import pulls_of
from fleetune.device_runtime.engine.weights import FrozenWeights
from fleetune.device_runtime.errors import ConfigError


class OrtTrainingEngine:
    """One ONNX Runtime Training module per depth in use; each runs whole batches.

    A layer whose mode is FORWARD gets no gradient in the result, but its gradient is computed.
    """

    def __init__(self, artifact: Artifact, setup: Setup) -> None:
        """Prepare; modules are opened when first needed. A setup's lanes are of no use here.

        Raises:
            ArtifactError: the artifact is for another backend, or damaged.
            ConfigError: a memory plan or a provider that this runtime cannot follow, or the training build is not here.
        """
        _check_memory(setup.memory)
        check_cpu("ort-training", setup.provider)
        check_threads(setup.threads)
        _api()
        self.artifact = artifact
        self.frozen = FrozenWeights(artifact, value_of)
        self._threads = setup.threads
        self._models = read_layout(artifact)
        self._opened: dict[int, Module] = {}

    def __enter__(self) -> "OrtTrainingEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of modules and weights."""
        self._opened.clear()
        self.frozen.close()

    def rows(self, size: int, tokens: int = 0, memory: MemoryPlan | None = None) -> Rows:
        """All at once, whatever their number; ConfigError for a memory plan."""
        _check_memory(memory or SAVE_ALL)
        return Rows()

    def step(
        self,
        batch: Arrays,
        plan: LayerPlan,
        adapter: Arrays,
        *,
        rows: Rows | None = None,
        keep_logits: bool = False,
        hidden: OpenRows | None = None,
        gates: Gates | None = None,
        cache_below: int = -1,
        each: OfRow | None = None,
        class_weights: Floats | None = None,
    ) -> StepResult:
        """As :meth:`Engine.step`; the logits always exist whole, and are returned; ``hidden`` is of no use here."""
        self._check_plan(plan)
        if each is not None:
            raise ConfigError("backend ort-training: no gradients of single rows, which DP-SGD needs")
        if class_weights is not None:
            raise ConfigError("backend ort-training: its loss weighs all classes alike")
        if gates is not None:
            raise ConfigError("backend ort-training: a layer runs on all rows of a batch or on none")
        layers = active_layers(plan)
        module = self.module(len(layers))
        module.write(self, adapter, layers)
        loss, logits = module.run(self, self.scope(batch), layers, training=True)
        grads = module.gradients(self, layers, set(trained_layers(plan)))
        return StepResult(
            loss, logits, grads, pulls_of(logits, batch[self.artifact.manifest.label_name], None)
        )

    def evaluate(self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None) -> tuple[float, Array]:
        """As :meth:`Engine.evaluate`."""
        loss, logits = self._evaluated(batch, adapter)
        return loss, logits.argmax(-1)

    def predict(
        self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None, plan: LayerPlan | None = None
    ) -> Array:
        """As :meth:`Engine.predict`; a plan is refused."""
        if plan is not None:
            raise ConfigError(f"backend {self.artifact.manifest.backend}: it answers at full depth only")
        manifest = self.artifact.manifest
        given = next(iter(batch.values())).shape
        labels = np.zeros(given[: len(manifest.inputs[manifest.label_index].shape)], np.int64)
        return self._evaluated({**batch, manifest.label_name: labels}, adapter)[1]

    def predict_at(
        self,
        batch: Arrays,
        adapter: Arrays,
        positions: Indices,
        *,
        rows: Rows | None = None,
        plan: LayerPlan | None = None,
    ) -> Array:
        """As :meth:`Engine.predict_at`; a plan is refused."""
        logits = self.predict(batch, adapter, plan=plan)
        return logits[np.arange(len(logits)), positions]

    def decode(self, adapter: Arrays, *, plan: LayerPlan | None = None) -> Decoding:
        """As :meth:`Engine.decode`; a plan is refused, and all tokens run for each new one."""
        check_generates(self.artifact.manifest)
        return Recomputed(self.artifact.manifest, self.predict_at, adapter, plan)

    def features(
        self,
        batch: Arrays,
        adapter: Arrays,
        *,
        rows: Rows | None = None,
        hidden: OpenRows | None = None,
        cache_below: int = 0,
    ) -> Array:
        """ConfigError: the head is no graph of its own."""
        raise ConfigError(
            "the models of ort-training are whole: what their last linear sees cannot be asked for"
        )

    def scope(self, batch: Arrays) -> dict[Any, Value]:
        """A checked batch as values."""
        check_batch(batch, self.artifact.manifest.inputs, bounds=self.artifact.manifest.bounds)
        rows = enumerate(self.artifact.manifest.inputs)
        return {("batch", i): value_of(np.ascontiguousarray(batch[row.name])) for i, row in rows}

    def module(self, depth: int) -> "Module":
        """The opened module of ``depth`` active layers.

        Raises:
            ConfigError: the artifact has no model of that depth.
        """
        if depth not in self._models:
            have = ", ".join(map(str, self._models))
            raise ConfigError(f"a plan of {depth} active layers; the artifact has models of {have}")
        if depth not in self._opened:
            self._opened[depth] = Module(self.artifact, self._models[depth], threads=self._threads)
        return self._opened[depth]

    def _evaluated(self, batch: Arrays, adapter: Arrays) -> tuple[float, Array]:
        layers = active_layers(full(self.artifact.manifest.num_layers))
        module = self.module(len(layers))
        module.write(self, adapter, layers)
        return module.run(self, self.scope(batch), layers, training=False)

    def _check_plan(self, plan: LayerPlan) -> None:
        if len(plan) != self.artifact.manifest.num_layers:
            raise ConfigError(
                f"plan of {len(plan)} layers; the model has {self.artifact.manifest.num_layers}"
            )
        if found := sorted({mode.name.lower() for mode in plan} & {"bypass", "bare"}):
            raise ConfigError(
                f"backend ort-training: no layer can {' or '.join(found)}; its models are whole"
            )


class Module:
    """One depth's training and eval model over one checkpoint of trainable parameters."""

    def __init__(self, artifact: Artifact, model: DepthModel, *, threads: int) -> None:
        """Open the files of ``model``."""
        api, folder = _api(), artifact.folder / model.folder
        self._model = model
        self._state = api.CheckpointState.load_checkpoint(folder / CHECKPOINT)
        self.module = api.Module(
            folder / TRAINING, self._state, folder / EVAL, session_options=_options(threads)
        )
        self._orders = {mode: self.module.train(mode).input_names() for mode in (True, False)}
        self._optimizer_file = folder / OPTIMIZER

    def optimizer(self) -> Any:
        """ONNX Runtime's own AdamW over this module's parameters: its moments belong to positions, not to layers."""
        return _api().Optimizer(self._optimizer_file, self.module)

    def write(self, engine: OrtTrainingEngine, adapter: Arrays, layers: tuple[int, ...]) -> None:
        """Copy the adapter's tensors of ``layers`` and of the head into the parameters."""
        rows = engine.artifact.manifest.tensors
        for bound in self._model.trained:
            array = adapter[rows[row_of(engine.artifact, bound, layers)].name]
            self._state.parameters[bound.name] = np.ascontiguousarray(array, np.float32)

    def read(self, engine: OrtTrainingEngine, layers: tuple[int, ...]) -> Arrays:
        """The parameters as adapter tensors by name."""
        rows = engine.artifact.manifest.tensors
        found = {bound.name: row_of(engine.artifact, bound, layers) for bound in self._model.trained}
        return {rows[i].name: np.array(self._state.parameters[name].data) for name, i in found.items()}

    def run(
        self, engine: OrtTrainingEngine, scope: dict[Any, Value], layers: tuple[int, ...], *, training: bool
    ) -> tuple[float, Array]:
        """Loss and logits; when training, gradients are made anew as well."""
        inputs = engine.artifact.manifest.inputs
        feeds = {row.name: scope["batch", i] for i, row in enumerate(inputs)}
        for bound in self._model.frozen:
            feeds[bound.name] = engine.frozen.value(row_of(engine.artifact, bound, layers))
        if training:
            self.module.lazy_reset_grad()
        self.module.train(training)
        with told(self._model.folder):
            loss, logits = self.module(*(feeds[name] for name in self._orders[training]))[:2]
        return float(np.asarray(array_of(loss)).reshape(())), np.array(array_of(logits))

    def gradients(self, engine: OrtTrainingEngine, layers: tuple[int, ...], trained: set[int]) -> Arrays:
        """The gradients of the last training run by tensor name, of the head and of the layers in ``trained``."""
        rows = engine.artifact.manifest.tensors
        found: Arrays = {}
        for bound in self._model.trained:
            if bound.position < 0 or layers[bound.position] in trained:
                name = rows[row_of(engine.artifact, bound, layers)].name
                found[name] = np.array(self._state.parameters[bound.name].grad, np.float32)
        return found


def _check_memory(memory: MemoryPlan) -> None:
    if memory != SAVE_ALL:
        raise ConfigError(
            f"{memory}: the models of ort-training run whole batches and keep all activations and weights"
        )


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return options


def _api() -> Any:
    try:
        from onnxruntime.training import api
    except ImportError as exc:
        raise ConfigError(
            f"an artifact for ort-training trains in an environment of its own ({exc}); run: {INSTALL}"
        ) from exc
    return api
