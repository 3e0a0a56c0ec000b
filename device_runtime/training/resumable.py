"""Takes a run to its end and keeps checkpoints of it: by steps, by time, in a pause, when it is stopped, and at the end."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.training.signals import Held
from fleetune.device_runtime.training.step_reports import StepReport
from fleetune.device_runtime.training.trainer import Trainer

log = logging.getLogger(__name__)


class Pace(NamedTuple):
    """How much work a kill may cost; 0 for no checkpoint by that measure."""

    steps: int
    seconds: float


class _Keeper:
    """The checkpoints of one run."""

    def __init__(self, trainer: Trainer, path: Path, pace: Pace, clock: Callable[[], float]) -> None:
        self._trainer, self._path, self._pace, self._clock = trainer, path, pace, clock
        self._saved_step, self._saved_at = trainer.step_index, clock()

    def save(self) -> bool:
        """Write one, if a step was taken since the last; returns whether the last step is in one."""
        step = self._trainer.step_index
        if step == self._saved_step:
            return step > 0
        self._saved_at = self._clock()
        try:
            self._trainer.save(self._path)
        except StateError as exc:
            log.warning("step %d: no checkpoint: %s", step, exc)
            return False
        self._saved_step = step
        return True

    def save_if_due(self) -> None:
        steps, seconds = self._pace
        by_steps = steps and self._trainer.step_index % steps == 0
        if by_steps or (seconds and self._clock() - self._saved_at >= seconds):
            self.save()


def finish(
    trainer: Trainer,
    path: Path,
    *,
    pace: Pace,
    wait: Callable[[Callable[[], object]], object],
    is_over: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepReport], object] | None = None,
    tell: Callable[[str], object] = lambda text: None,
    again: str = "the same arguments go on",
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Take every step that is left, or as many as ``is_over`` lets; a checkpoint that cannot be written is a warning.

    A first SIGINT or SIGTERM waits for the step at work, and what is done is saved before the signal takes its way. A second one
    does not wait: what was saved before is what stays.

    Args:
        trainer: a run, restored or new.
        path: its checkpoint.
        pace: when a checkpoint is due.
        wait: returns when the next step may be taken; calls what it is given first if that will be a while.
        is_over: asked before each step whether the run ends here; it may take its time.
        on_step: called with each step's report.
        tell: told that a signal waits, and where the run stands when it is stopped.
        again: what goes on from there, for who reads that.
        clock: seconds.
    """
    keeper = _Keeper(trainer, path, pace, clock)
    with Held(lambda: tell("stopping after this step; once more to stop at once"), clock=clock) as held:
        is_whole = True
        try:
            while not trainer.done:
                with held.released():
                    if is_over():
                        break
                    wait(keeper.save)
                is_whole = False
                report = trainer.step()
                is_whole = True
                if on_step:
                    on_step(report)
                keeper.save_if_due()
                held.deliver()
            keeper.save()
        except (KeyboardInterrupt, SystemExit):
            if is_whole:
                is_saved = keeper.save()
                tell(
                    f"stopped at step {trainer.step_index} of {trainer.total_steps}{f'; {again}' * is_saved}"
                )
            raise
