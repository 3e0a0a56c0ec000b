"""What an evaluating device keeps of its evaluations, for its owner; the aggregator is told loss, accuracy and count alone."""

import logging
from collections.abc import Callable
from pathlib import Path

from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.arrays import PRIVATE, Arrays
from fleetune.device_runtime.commands.evaluating import Counted, described, judge, keep_evaluation
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.scores import ACCURACY, PERPLEXITY, perplexity, score_of
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.training.evaluation import Evaluation
from fleetune.device_runtime.training.machine import Machine

log = logging.getLogger(__name__)


class OwnEvaluations:
    """Told of every event of a device; writes what was measured when its report is on its way."""

    def __init__(
        self, folder: Path, manifest: Manifest, data: Path, *, then: Callable[[Event], object]
    ) -> None:
        """Prepare; ``then`` is told of every event too."""
        self._folder, self._manifest, self._data, self._then = folder, manifest, data, then
        self._measured: tuple[Evaluation, Counted | None] | None = None

    def judge(
        self, machine: Machine, dataset: Dataset, adapter: Arrays, *, before_batch: Callable[[], object]
    ) -> Evaluation:
        """Measure an adapter as :meth:`Machine.evaluate`."""
        self._measured = judge(machine, dataset, adapter, manifest=self._manifest, before_batch=before_batch)
        return self._measured[0]

    def __call__(self, event: Event) -> None:
        """Take an event; files that cannot be written are a warning, for the report does not depend on them."""
        if event.kind == "evaluated" and self._measured:
            found, counted = self._measured
            self._measured = None
            of_round = described(found, counted, self._manifest, data=self._data, round=event.round)
            try:
                keep_evaluation(self._folder, of_round, mode=PRIVATE)
            except StateError as exc:
                log.warning("round %d: %s", event.round, exc)
        self._then(self._named(event))

    def _named(self, event: Event) -> Event:
        """An event whose score is called what it is."""
        score = score_of(self._manifest)
        if event.kind != "evaluated" or score == ACCURACY:
            return event
        figures = dict(event.values)
        if score == PERPLEXITY:
            return event._replace(values=figures | {score: perplexity(figures["loss"])})
        return event._replace(values={"loss": figures["loss"], score: figures[ACCURACY]})
