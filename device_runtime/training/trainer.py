"""One local run: steps over a data set by a layer policy and an optimizer, resumable bit for bit."""

import hashlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fleetune.device_runtime.arrays import Arrays, Floats, Indices, to_bytes
from fleetune.device_runtime.contracts.artifact import check_adapter
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, active_layers, lowest_trained
from fleetune.device_runtime.contracts.wire import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.hidden_cache import PrefixCache, PrefixRows
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.optim import make_optimizer
from fleetune.device_runtime.methods.policies import PolicyState, make_policy
from fleetune.device_runtime.methods.work import check_work
from fleetune.device_runtime.training.checkpoint import Checkpoint, Origin, load_checkpoint, save_checkpoint
from fleetune.device_runtime.training.step_reports import History, StepReport

if TYPE_CHECKING:
    from fleetune.device_runtime.engine.stack import Stack


class Trainer:
    """A run of ``work`` from ``adapter``: a function of its arguments alone, wherever it is interrupted.

    The layer plan of step i is drawn from ``default_rng([seed, i])`` and its batch from (seed, epoch), so that a run
    continues from its step count, adapter, optimizer state and policy state. The policy is told i plus the steps of the
    rounds before, taken to be as many in each as in this one.
    """

    def __init__(
        self,
        stack: "Stack",
        dataset: Dataset,
        work: LocalWork,
        adapter: Arrays,
        *,
        prefix: PrefixCache | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            stack: an opened artifact.
            dataset: labelled samples.
            work: what to do; ``steps`` 0 means ``epochs`` passes over the data.
            adapter: float32 tensors by name, exactly the manifest's trainable ones; not written to.
            prefix: where examples' hidden streams below the lowest trained layer are kept.

        Raises:
            ArtifactError: the adapter does not fit the artifact.
            ConfigError: a number of ``work`` is out of range, or a name unknown.
        """
        manifest = stack.artifact.manifest
        check_adapter(manifest, adapter)
        check_work(work, manifest.num_layers)
        self.adapter = dict(adapter)
        self.step_index = 0
        self.total_steps = work.steps or work.epochs * dataset.num_batches(work.batch_size)
        self.history = History(self.total_steps)
        self._stack, self._dataset, self._work, self._prefix = stack, dataset, work, prefix
        stack.expect(min(work.batch_size, dataset.num_samples), dataset.mean_tokens)
        self._origin = Origin(stack.artifact.digest, dataset.digest, _digest(adapter), work)
        self._policy = make_policy(work.policy, manifest.num_layers)
        self._policy_state: PolicyState = {}
        self._optimizer = make_optimizer(work.optimizer, total_steps=self.total_steps)
        self._optimizer_state = self._optimizer.init(self.adapter)
        self._epoch: tuple[int, list[Indices]] = (-1, [])

    @property
    def done(self) -> bool:
        """Whether every step is taken."""
        return self.step_index >= self.total_steps

    def step(self) -> StepReport:
        """Take one step.

        Raises:
            ConfigError: the loss, a gradient or an updated tensor is not finite; the run stands before this step.
        """
        start_s = time.perf_counter()
        before = self._work.rounds_before * self.total_steps
        plan = self._policy(before + self.step_index, self._rng(), self._policy_state)
        examples = self._batch()
        batch, cached = self._dataset.rows(examples), self._cached(examples, plan)
        result = self._stack.step(batch, plan, self.adapter, prefix=cached)
        self._update(result.loss, result.grads)
        seconds = time.perf_counter() - start_s
        report = StepReport(self.step_index, self.total_steps, result.loss, len(active_layers(plan)), seconds)
        self.history.append(report)
        self.step_index += 1
        return report

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        checkpoint = Checkpoint(
            self._origin,
            self.step_index,
            self._policy_state,
            self.adapter,
            self._optimizer_state,
            self.history.columns(),
        )
        save_checkpoint(path, checkpoint)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of this very run.

        Raises:
            ArtifactError: not a checkpoint, or a damaged one.
            ConfigError: the checkpoint is of another run (artifact, data, starting adapter or work).
        """
        found = load_checkpoint(path, self._origin)
        check_adapter(self._stack.artifact.manifest, found.adapter)
        self.adapter, self._optimizer_state = found.adapter, found.optimizer
        self.step_index, self._policy_state = found.step, found.policy_state
        self.history = History(self.total_steps, found.history)

    def _cached(self, examples: Indices, plan: LayerPlan) -> PrefixRows | None:
        """The examples' rows in the cache; the layers below are the base, their adapters and modes."""
        m, lowest = self._stack.artifact.manifest, lowest_trained(plan)
        if self._prefix is None or Mode.FORWARD not in plan[:lowest]:
            return None
        used = {*m.prelude.tensors, *(i for layer in m.layers[:lowest] for i in layer.tensors)}
        names = sorted(m.tensors[i].name for i in used if m.tensors[i].trainable)
        below: Arrays = {name: self.adapter[name] for name in names}
        return self._prefix.of(examples, {"plan": np.array(plan[:lowest]), **below})

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self._work.seed, self.step_index])

    def _batch(self) -> Indices:
        epoch, place = divmod(self.step_index, self._dataset.num_batches(self._work.batch_size))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._dataset.epoch_batches(self._work.seed, epoch, self._work.batch_size)
        return self._epoch[1][place]

    def _update(self, loss: float, grads: Arrays) -> None:
        wrong = [] if math.isfinite(loss) else [f"the loss is {loss}"]
        wrong += [f"the gradient of {name} is not finite" for name in _not_finite(grads)]
        if not wrong:
            with np.errstate(over="ignore", invalid="ignore"):  # found below, with a message
                adapter, state = self._optimizer.update(grads, self._optimizer_state, self.adapter)
            wrong = [
                f"{name} is not finite after the update"
                for name in _not_finite({n: adapter[n] for n in grads})
            ]
        if wrong:
            lr = self._work.optimizer.lr
            raise ConfigError(
                f"step {self.step_index}: {wrong[0]}; try a lower learning rate than {lr}, or clip_norm 1"
            )
        self.adapter, self._optimizer_state = adapter, state


def _not_finite(arrays: Arrays) -> list[str]:
    floats: dict[str, Floats] = {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}
    return [name for name, array in floats.items() if not np.isfinite(array).all()]


def _digest(arrays: Arrays) -> str:
    return hashlib.sha256(to_bytes(arrays)).hexdigest()
