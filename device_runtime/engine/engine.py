"""What trains, evaluates and asks an opened artifact, whatever its backend: all that a trainer or a command knows of it."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from fleetune.device_runtime.arrays import Array, Arrays, Floats, Indices
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan
from fleetune.device_runtime.engine.batches import StepResult
from fleetune.device_runtime.engine.decoding import Decoding
from fleetune.device_runtime.engine.gates import Gates
from fleetune.device_runtime.engine.hidden_cache import OpenRows
from fleetune.device_runtime.engine.lanes import Rows

OfRow = Callable[[Arrays], Arrays]
"""Makes something of the gradients of one row's own loss; several threads may call it at once."""


class Setup(NamedTuple):
    """What an engine runs on."""

    threads: int = 0
    """For the kernels; 0 for one a core."""
    memory: MemoryPlan = SAVE_ALL
    """How rows, activations and frozen weights are held, unless a call says otherwise."""
    provider: str = "cpu"
    """Of onnxruntime: ``cpu``, ``cuda``, ``tensorrt`` or ``xnnpack``."""
    in_lanes: bool = True
    """Whether rows may be spread over the threads; int8 rounding and the order of sums can tell."""
    most_step_s: float = 0.0
    """Longest time of one call on a batch, after which it is stopped; 0 for any. Of block graphs that onnxruntime runs."""


class Engine(Protocol):
    """An opened artifact. What a call returns depends on its arguments and the setup alone, never on the calls before."""

    @property
    def artifact(self) -> Artifact:
        """What it runs."""

    def rows(self, size: int, tokens: int = 0, memory: MemoryPlan | None = None) -> Rows:
        """How batches of ``size`` rows of about ``tokens`` (0: unknown) run best; ``memory`` None for the setup's.

        Raises:
            ConfigError: a memory plan with a number below 0, or one that this engine cannot follow.
        """

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
        """Run forward and backward once over the active layers; weights are not touched.

        Args:
            batch: arrays by the manifest's input names, the labels included.
            plan: one mode per layer.
            adapter: every trainable tensor by name, float32.
            rows: how its rows run; None for what :meth:`rows` says of this batch.
            keep_logits: return them also where they are large (batch, seq, vocabulary).
            hidden: where the examples' hidden streams are kept as they flow over the boundary; filled for those not there.
            gates: bool (layers, batch): which rows run through which layer, for the others it is the identity; None for all.
            cache_below: no layer below this one learns anywhere: the boundary is here, or at the lowest trained layer where
                that is lower; -1 for there.
            class_weights: float32 (classes,), above 0: the loss is the mean over labels weighted by these, as torch's
                cross-entropy with ``weight`` has it; None for the plain mean. Of a head that counts labels of classes.
            each: what is made of each row's own gradients before they come together. Rows then run one by one.

        Returns:
            Mean loss, logits, and gradients by tensor name, float32, for the trained layers and the head only. With ``each`` the
            sums over the rows of their losses and of what it makes, added in the order of the rows whatever the lanes.

        Raises:
            ArtifactError: a name, dtype or shape differs from the manifest (all differences listed).
            ConfigError: a plan of another length, gates of another shape, or a mode or gates that this engine cannot follow.
        """

    def evaluate(self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None) -> tuple[float, Array]:
        """Mean loss and answers at full depth; ``batch`` as of :meth:`step`.

        Answers are the likeliest classes int64 (batch,) or (batch, seq); of a regression, or of label sets, the logits.
        """

    def predict(
        self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None, plan: LayerPlan | None = None
    ) -> Array:
        """Logits (batch, …, classes), without the layers that ``plan`` drops, if any; ``batch`` needs no labels.

        Raises:
            ConfigError: a plan of another length, or an engine that runs all layers or none.
        """

    def predict_at(
        self,
        batch: Arrays,
        adapter: Arrays,
        positions: Indices,
        *,
        rows: Rows | None = None,
        plan: LayerPlan | None = None,
    ) -> Array:
        """Logits (batch, vocabulary) of one token in each row, whose places are ``positions`` (batch,).

        Raises:
            ConfigError: as of :meth:`predict`, or the head does not work token by token.
        """

    def decode(self, adapter: Arrays, *, plan: LayerPlan | None = None) -> Decoding:
        """Begin texts that grow token by token, without the layers that ``plan`` drops, if any.

        Raises:
            ConfigError: as of :meth:`predict`, or the model does not say which token comes next.
        """

    def features(
        self,
        batch: Arrays,
        adapter: Arrays,
        *,
        rows: Rows | None = None,
        hidden: OpenRows | None = None,
        cache_below: int = 0,
    ) -> Array:
        """What the linear that ends a classifier sees, (batch, width) float32, at full depth; ``batch`` needs no labels.

        What flows into layer ``cache_below`` is kept in ``hidden``, where later steps find it; nothing of it is read here.

        Raises:
            ConfigError: as :func:`fleetune.device_runtime.contracts.class_means.class_head`, or this engine cannot.
        """

    def close(self) -> None:
        """Let go of threads, graphs and weights."""

    def __enter__(self) -> "Engine":
        """Return itself."""

    def __exit__(self, *_: object) -> None:
        """Close."""
