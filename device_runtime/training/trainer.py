"""One local run: steps over a data set by a layer policy and an optimizer, resumable bit for bit."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Arrays, Floats, Indices, to_bytes
from fleetune.device_runtime.contracts.artifact import check_adapter
from fleetune.device_runtime.contracts.gaussian import new_secret
from fleetune.device_runtime.contracts.lora import (
    drawn_rows,
    frozen_names,
    lora_problems,
    restored,
    truncated,
)
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, active_layers, trained_layers
from fleetune.device_runtime.contracts.thresholds import (
    descended,
    parameters_of,
    pruned,
    stays,
    straight_through,
)
from fleetune.device_runtime.contracts.work import ADAPTER, LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.engine.batches import Mean, StepResult
from fleetune.device_runtime.engine.engine import Engine, OfRow
from fleetune.device_runtime.engine.gates import Gates
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.engine.lanes import one_by_one
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.optim import make_optimizer, scheduled_rate
from fleetune.device_runtime.methods.personal import personal_layers
from fleetune.device_runtime.methods.policies import frozen_below, make_gates, make_policy
from fleetune.device_runtime.methods.policy import PolicyState
from fleetune.device_runtime.methods.protection import EFFECTS, needs_effects
from fleetune.device_runtime.methods.transforms import clip_scale
from fleetune.device_runtime.methods.work import check_work
from fleetune.device_runtime.options import refuse
from fleetune.device_runtime.training.checkpoint import (
    Checkpoint,
    Origin,
    damaged,
    layout_problems,
    load_checkpoint,
    save_checkpoint,
)
from fleetune.device_runtime.training.class_weights import read_class_weights
from fleetune.device_runtime.training.evaluation import Evaluation, evaluate
from fleetune.device_runtime.training.held_out import figures, measured_rows, split
from fleetune.device_runtime.training.importance import Importance
from fleetune.device_runtime.training.influence import Influence
from fleetune.device_runtime.training.sample_privacy import SamplePrivacy, in_groups
from fleetune.device_runtime.training.skip_effects import skip_effects
from fleetune.device_runtime.training.step_reports import History, StepReport

log = logging.getLogger(__name__)

_LENGTH = ("steps", "epochs")


class Trainer:
    """A run of ``work`` from ``adapter``: a function of its arguments alone, wherever it is interrupted, and whoever else trains.

    The layer plan of step i is drawn for (seed, i) and its batch for (seed, epoch), so that a run continues from its
    step count, adapter, optimizer state and policy state. The policy is told i plus the steps of the rounds before,
    taken to be as many in each as in this one.
    """

    def __init__(
        self,
        engine: Engine,
        dataset: Dataset,
        work: LocalWork,
        adapter: Arrays,
        *,
        memory: MemoryPlan | None = None,
        hidden: HiddenCache | None = None,
        head_start: str = "none",
        class_weights: str = "",
        effects: Callable[[], list[float]] | None = None,
        expected_mb: float = 0.0,
        secret: bytes = b"",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare a run.

        Args:
            engine: an opened artifact; it may serve any number of trainers.
            dataset: labelled samples; a ``held_out`` share of them never trains, and tells what the run has gained.
            work: what to do; ``steps`` 0 means ``epochs`` passes over the samples that train.
            adapter: float32 tensors by name, exactly the manifest's trainable ones; not written to.
            memory: how a step is held, beside the bound in tokens that ``work`` asks; None for the engine's own way.
            hidden: where examples' hidden streams below the lowest trained layer are kept, by their places in ``dataset``.
            head_start: what the head begins with, for checkpoints to know it by; :meth:`begin_with` puts it in place.
            class_weights: of the loss, as :func:`read_class_weights` takes them, in the place of those of ``work``; what is
                measured on held-out rows has none.
            effects: measures, or remembers, each layer's skip effect; asked before the first step of a policy that needs them.
                None to measure them.
            expected_mb: memory that the deepest step is expected to take, 10^6 bytes, for :attr:`stats`; 0 if that is not known.
            secret: that work which hides samples draws its batches and noise from; empty for one of this run alone, which then
                cannot go on to the bit.
            clock: seconds, for the reports; their times go into checkpoints.

        Raises:
            ArtifactError: the adapter does not fit the artifact.
            ConfigError: a number of ``work`` is out of range, a name unknown, or the artifact has not the LoRA that it is about.
        """
        manifest = engine.artifact.manifest
        check_adapter(manifest, parameters_of(adapter))
        check_work(work, manifest.num_layers, learning=len(manifest.learning))
        if work.learns != ADAPTER:
            raise ConfigError(f"work that learns {work.learns} takes no steps")
        refuse(lora_problems(work, manifest))
        self.adapter = truncated(adapter, work.rank)
        self.step_index = 0
        parts = split(dataset, work.held_out)
        self._dataset, self._kept, self._held = parts.training, parts.kept, measured_rows(parts, work)
        self.total_steps = self._dataset.num_steps(work)
        self.history = History(self.total_steps)
        if work.micro_tokens:
            own = engine.rows(work.batch_size).memory if memory is None else memory
            memory = own._replace(micro_tokens=work.micro_tokens)
        self._engine, self._work, self._memory = engine, work, memory
        self._hidden, self._clock, self._expected_mb = hidden, clock, expected_mb
        self._rows = engine.rows(
            min(work.batch_size, self._dataset.num_samples), self._dataset.mean_tokens, memory
        )
        self._figures: dict[str, float] = {}
        self._origin = Origin(
            engine.artifact.digest, dataset.digest, _digest(adapter), work, head_start, class_weights
        )
        weighed = class_weights or work.class_weights
        self._class_weights = read_class_weights(weighed, manifest, self._dataset)
        if weighed and work.hides_samples:
            raise ConfigError(
                "dp sample: class weights make a sample's share depend on the others'; leave them out"
            )
        self._privacy: SamplePrivacy | None = None
        if work.hides_samples:
            size, secret = self._dataset.num_samples, secret or new_secret()
            self._privacy = SamplePrivacy(self._origin, num_samples=size, secret=secret)
            self._rows = one_by_one(self._rows)
        self._policy = make_policy(work.policy, manifest.num_layers)
        self._gates = make_gates(work.policy, manifest.num_layers)
        self._policy_state: PolicyState = {}
        self._effects = effects or partial(
            skip_effects, engine, dataset, pruned(adapter), seed=work.seed, memory=memory
        )
        frozen = frozen_below(work.policy, manifest.num_layers)
        self._cache_below = frozen if work.cache_below < 0 else work.cache_below
        self._optimizer = make_optimizer(work.optimizer, total_steps=self.total_steps)
        self._optimizer_state = self._optimizer.init(self._parameters)
        self._epoch: tuple[int, list[Indices]] = (-1, [])
        self._frozen = frozen_names(self.adapter, work)
        self._drawn = drawn_rows(self.adapter, work)
        self._adapters = manifest.layer_adapters
        self._importance = Importance(self._adapters)
        self._rate = scheduled_rate(work.optimizer, total_steps=self.total_steps)
        self._influence = Influence(
            work.optimizer, num_layers=manifest.num_layers, num_samples=self._dataset.num_samples
        )

    @property
    def origin(self) -> Origin:
        """What the run is a function of."""
        return self._origin

    @property
    def done(self) -> bool:
        """Whether every step is taken."""
        return self.step_index >= self.total_steps

    @property
    def importance(self) -> tuple[float, ...]:
        """Mean gradient norm of each layer over the steps that trained it; 0 for a layer that none did."""
        return self._importance.values

    @property
    def effective_samples(self) -> float:
        """Samples behind the steps taken, where those that outweigh the others count for fewer: see :class:`Influence`."""
        return self._influence.effective

    @property
    def personal(self) -> frozenset[str]:
        """Names of the tensors that stay on the device, as the steps taken so far have it."""
        if stays(self._work):
            return frozenset(self._parameters)
        kept = personal_layers(self._work, self.importance)
        shared = (names for i, names in enumerate(self._adapters) if i not in kept)
        return frozenset().union(*(self._adapters[i] for i in kept)).difference(*shared)

    @property
    def stats(self) -> Mapping[str, float]:
        """More figures of the steps done: see ``stats`` of :class:`fleetune.device_runtime.contracts.wire.UpdateReady`."""
        found = dict(self._figures)
        if "trained_layers" in found and self.step_index:
            found["trained_layers"] /= self.step_index
        return found | ({"peak_mb": self._expected_mb} if self._expected_mb else {})

    def step(self) -> StepReport:
        """Take one step; the held-out part is measured before the first and after the last.

        Raises:
            ConfigError: the loss, a gradient or an updated tensor is not finite, or nothing is trained; the run stands before
                this step.
        """
        if not self.step_index:
            self._measure("before")
        start_s = self._clock()
        examples = self._batch()
        plan, gates = self._planned(len(examples))
        if self._privacy:
            result = self._privately(self._privacy, examples, plan)
        else:
            result = self._run(examples, plan, gates)
        if not (result.grads or trained_layers(plan)):
            raise ConfigError(
                f"policy {self._work.policy.name!r} trains the head alone, and this model's is frozen"
            )
        grads = self._learned(straight_through(result.grads, self.adapter))
        self._update(result.loss, grads)
        self._importance.add(grads, trained_layers(plan))
        self._influence.add(
            examples,
            result.pulls,
            trained=trained_layers(plan),
            rate=self._rate(self.step_index),
            clip=clip_scale(parameters_of(grads), self._work.optimizer.clip_norm),
            gates=gates,
        )
        seconds = self._clock() - start_s
        layers = len(active_layers(plan)) if gates is None else float(gates.mean(1).sum())
        report = StepReport(self.step_index, self.total_steps, result.loss, layers, seconds)
        self.history.append(report)
        self._count(plan)
        self.step_index += 1
        if self.done:
            self._measure("after")
        return report

    def begin_with(self, head: Arrays) -> None:
        """Put these tensors in the place of the starting adapter's, before the first step of a run that was not restored.

        Raises:
            ConfigError: a step is taken.
            ArtifactError: they do not fit the artifact.
        """
        if self.step_index:
            raise ConfigError(f"a run at step {self.step_index} begins with nothing")
        check_adapter(self._engine.artifact.manifest, {**self._parameters, **head})
        self.adapter = {**self.adapter, **head}
        self._optimizer_state = self._optimizer.init(self._parameters)

    @property
    def _parameters(self) -> Arrays:
        """What the optimizer moves; thresholds have a descent of their own."""
        return parameters_of(self.adapter)

    def measure(self, adapter: Arrays) -> Evaluation | None:
        """Measure an adapter on the held-out part at full depth; None if nothing is held out."""
        if self._held is None:
            return None
        size, memory = self._work.batch_size, self._memory
        return evaluate(self._engine, self._held, adapter, batch_size=size, memory=memory)

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        checkpoint = Checkpoint(
            self._origin,
            self.step_index,
            self._policy_state,
            self.adapter,
            self._optimizer_state,
            self.history.columns(),
            self._importance.columns(),
            self._figures,
            self._influence.columns(),
        )
        save_checkpoint(path, checkpoint)

    def restore(self, path: Path, *, any_length: bool = False) -> None:
        """Continue from a checkpoint of this very run.

        Args:
            path: the file.
            any_length: take one of a run of more or fewer steps too, if it would have been the same so far: not where the
                learning rate decays towards the last step.

        Raises:
            StateError: not a checkpoint, or a damaged one; the run stands as it did.
            ConfigError: the checkpoint is of another run (artifact, data, starting adapter or work), or past this one's end.
        """
        is_free = any_length and self._work.optimizer.decay == "constant"
        found = load_checkpoint(path, self._origin, but_for=_LENGTH if is_free else ())
        if found.step > self.total_steps:
            raise ConfigError(
                f"{path}: {found.step} steps are taken there, and {self.total_steps} are asked for here; "
                "use another output folder, or resume=False (--no-resume) to start anew"
            )
        if problems := self._problems(found):
            raise damaged(path, "; ".join(problems))
        self.adapter, self._optimizer_state = found.adapter, found.optimizer
        self.step_index, self._policy_state = found.step, found.policy_state
        self.history = History(self.total_steps, found.history)
        self._importance.restore(found.importance)
        self._influence.restore(dict(found.influence))
        self._figures = dict(found.figures)

    def _problems(self, found: Checkpoint) -> list[str]:
        """Why this run cannot go on from there: names, dtypes, shapes, values, or their number."""
        if found.step > self.total_steps:
            return [f"step {found.step} of {self.total_steps}"]
        steps = {name: np.empty(found.step) for name in self.history.columns()}
        problems = layout_problems(found.adapter, self.adapter)
        problems += self._optimizer_problems(found.optimizer)
        problems += layout_problems(found.history, steps)
        problems += self._importance.problems(found.importance)
        problems += self._influence.problems(dict(found.influence))
        return problems or [f"{name} is not finite" for name in _not_finite(found.adapter)]

    def _optimizer_problems(self, found: Arrays) -> list[str]:
        """State of a tensor appears whole with its first gradient, as a step with no gradient at all shows."""
        parameters = self._parameters
        first = self._optimizer.init(parameters)
        idle = {name: np.zeros_like(value) for name, value in parameters.items()}
        _, full = self._optimizer.update(idle, first, parameters)
        tensors = {name.partition("/")[2] for name in found.keys() - first.keys()}
        wanted = {n: a for n, a in full.items() if n in first or n.partition("/")[2] in tensors}
        counts = [n for n, array in found.items() if array.dtype.kind == "i" and np.less(array, 0).any()]
        return layout_problems(found, wanted) or [f"{name}: negative" for name in counts]

    def _run(
        self, examples: Indices, plan: LayerPlan, gates: Gates | None = None, each: OfRow | None = None
    ) -> StepResult:
        """The engine's step on these rows of the data."""
        options: dict[str, Any] = {"each": each} if each else {}
        if self._class_weights is not None:
            options["class_weights"] = self._class_weights
        return self._engine.step(
            self._dataset.rows(examples),
            plan,
            pruned(self.adapter),
            rows=self._rows,
            hidden=partial(self._hidden.of, self._kept[examples]) if self._hidden else None,
            gates=gates,
            cache_below=self._cache_below,
            **options,
        )

    def _privately(self, privacy: SamplePrivacy, examples: Indices, plan: LayerPlan) -> StepResult:
        """A step of DP-SGD: its gradients have their noise; loss and pulls have none."""
        sums = Mean(1)
        for group in in_groups(examples):
            sums.add(self._run(group, plan, each=lambda grads: privacy.clipped(self._learned(grads))), 1)
        found = sums.result()
        loss = found.loss / max(1, len(examples))
        if not math.isfinite(loss):
            log.warning("step %d: a loss is not finite, and its sample counts for nothing", self.step_index)
            loss = 0.0
        shapes = {name: self.adapter[name].shape for name in self._trained_by(plan)}
        return found._replace(loss=loss, grads=privacy.hidden(self.step_index, found.grads, shapes))

    def _trained_by(self, plan: LayerPlan) -> frozenset[str]:
        """Names of the tensors that a plan trains, whatever the batch."""
        manifest = self._engine.artifact.manifest
        head = (manifest.tensors[i] for i in manifest.head.tensors)
        names = frozenset(row.name for row in head if row.trainable)
        return names.union(*(self._adapters[i] for i in trained_layers(plan))) - self._frozen

    def _planned(self, num_rows: int) -> tuple[LayerPlan, NDArray[np.bool_] | None]:
        """The layer plan of the next step, and its row gates (layers, rows) if it has any."""
        step = self._work.rounds_before * self.total_steps + self.step_index
        draws, state = Draws(self._work.seed, "plans", self.step_index), self._policy_state
        if needs_effects(self._work.policy) and EFFECTS not in state:
            state[EFFECTS] = self._effects()
        plan = self._policy(step, draws, state)
        return plan, self._gates(step, draws, state, num_rows) if self._gates else None

    def _count(self, plan: LayerPlan) -> None:
        """Add up the layers that trained; a checkpoint of an earlier release does not know those of its steps."""
        if not self.step_index or "trained_layers" in self._figures:
            self._figures["trained_layers"] = self._figures.get("trained_layers", 0.0) + len(
                trained_layers(plan)
            )

    def _measure(self, when: str) -> None:
        start_s = self._clock()
        if when == "after" and "held_loss_before" not in self._figures:
            return
        if (found := self.measure(self.adapter)) is None:
            return
        spent_s = self._figures.get("held_seconds", 0.0) + self._clock() - start_s
        self._figures |= {**figures(when, found), "held_seconds": spent_s}

    def _batch(self) -> Indices:
        if self._privacy:
            return self._dataset.by_length(self._privacy.batch(self.step_index))
        epoch, place = divmod(self.step_index, self._dataset.num_batches(self._work.batch_size))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._dataset.epoch_batches(self._work.seed, epoch, self._work.batch_size)
        return self._epoch[1][place]

    def _learned(self, grads: Arrays) -> Arrays:
        """Gradients of what this work trains; of components that do not learn they are zeros, in any norm of them."""
        learning = truncated({n: g for n, g in grads.items() if n not in self._frozen}, self._work.rank)
        rows = {name: rows for name, rows in self._drawn.items() if name in learning}
        return restored(learning, {name: np.zeros_like(learning[name]) for name in rows}, rows)

    def _update(self, loss: float, grads: Arrays) -> None:
        wrong = [] if math.isfinite(loss) else [f"the loss is {loss}"]
        wrong += [f"the gradient of {name} is not finite" for name in _not_finite(grads)]
        if not wrong:
            with np.errstate(over="ignore", invalid="ignore"):  # found below, with a message
                rise = parameters_of(grads)
                moved, state = self._optimizer.update(rise, self._optimizer_state, self._parameters)
                moved |= descended({**self.adapter, **moved}, grads, self._work.optimizer.lr)
            # Weight decay, and Adam of a gradient of zeros, would move what does not learn.
            adapter = restored(moved, self.adapter, self._drawn)
            wrong = [
                f"{name} is not finite after the update"
                for name in _not_finite({n: adapter[n] for n in grads})
            ]
        if wrong:
            lr = self._work.optimizer.lr
            advice = f"try a lower learning rate than {lr}, or clip_norm 1"
            if not self.step_index and not math.isfinite(loss):
                advice = "nothing is learned yet: there is NaN in the model's weights, or they overflow; export again"
            raise ConfigError(f"step {self.step_index}: {wrong[0]}; {advice}")
        self.adapter, self._optimizer_state = adapter, state


def _not_finite(arrays: Arrays) -> list[str]:
    floats: dict[str, Floats] = {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}
    return [name for name, array in floats.items() if not np.isfinite(array).all()]


def _digest(arrays: Arrays) -> str:
    return hashlib.sha256(to_bytes(arrays)).hexdigest()
