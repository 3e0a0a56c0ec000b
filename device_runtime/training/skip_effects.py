"""What each layer does to a model's answer: how far the answer turns when that layer is skipped, on a device's own examples.

The skip effect of a layer is 1 less the mean cosine between the logits at full depth and those without the layer. Logits are the
simplest output that every artifact has. Ours; a layer's change of the hidden stream (ShortGPT, arXiv 2403.03853) misses
what later layers make of it.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Arrays, Indices, to_bytes, write_atomically
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, dropping
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.engine.token_head import shifted
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.files import read_json

log = logging.getLogger(__name__)

NUM_EXAMPLES = 100
_BATCH_SIZE = 32
_FILE = "skip-effects.json"


def skip_effects(
    engine: Engine, dataset: Dataset, adapter: Arrays, *, seed: int, memory: MemoryPlan | None = None
) -> list[float]:
    """Measure the skip effect of each layer, 0 (none) to 2, on examples drawn for the seed.

    A row has one answer; where each of its tokens has, those that count are compared, of a causal language model the last.

    Args:
        engine: an opened artifact.
        dataset: samples; 100 of them are drawn.
        adapter: every trainable tensor by name, float32.
        seed: of the draw.
        memory: how a batch is held; None for the engine's own way.

    Raises:
        ConfigError: the logits are not finite, no label counts where tokens have them, or the engine cannot leave a layer out.
    """
    drawn = Draws(seed, "effects", 0).permutation(dataset.num_samples)[:NUM_EXAMPLES]
    some, num_layers = dataset.subset(drawn), engine.artifact.manifest.num_layers
    rows = engine.rows(min(_BATCH_SIZE, some.num_samples), some.mean_tokens, memory)
    batches = some.ordered_batches(_BATCH_SIZE)
    cosines = np.concatenate([_cosines(engine, some, b, adapter, rows, num_layers) for b in batches], axis=1)
    if not cosines.size:
        raise ConfigError("skip effects: no label of the samples counts, and only their tokens have answers")
    effects: NDArray[np.float64] = 1 - cosines.mean(1)  # (L,)
    if not np.isfinite(effects).all():
        raise ConfigError(
            "skip effects: the logits are not finite; start from another adapter, or export again"
        )
    return [float(effect) for effect in effects]


class KeptEffects:
    """The skip effects of a device, measured once for its data and artifact, and kept in a file.

    A run that is no continuation (no rounds before it) measures anew from another adapter or seed: its result depends on its
    arguments alone.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        """Prepare; the file lies in ``folder``, which is made when there is something to keep."""
        self._engine, self._path = engine, folder / _FILE

    def of(
        self, dataset: Dataset, work: LocalWork, adapter: Arrays, *, memory: MemoryPlan | None = None
    ) -> list[float]:
        """Return the effects at hand, or measure them; arguments as of :func:`skip_effects`."""
        start = hashlib.sha256(to_bytes(adapter) + str(work.seed).encode()).hexdigest()
        wanted = _Kept(self._engine.artifact.digest, dataset.digest, start, [])
        kept = self._read()
        if kept and _is_of(kept, wanted, goes_on=work.rounds_before > 0):
            return kept.effects
        effects = skip_effects(self._engine, dataset, adapter, seed=work.seed, memory=memory)
        log.info("skip effects of the layers: %s", ", ".join(f"{effect:.3f}" for effect in effects))
        self._write(msgspec.structs.replace(wanted, effects=effects))
        return effects

    def _read(self) -> "_Kept | None":
        with suppress(ArtifactError):  # damaged: they are measured again
            return read_json(self._path, _Kept)
        return None

    def _write(self, kept: "_Kept") -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, msgspec.json.encode(kept))
        except OSError as exc:
            log.warning(
                "%s: cannot be written: %s; measured again after a restart", self._path, exc.strerror or exc
            )


class _Kept(msgspec.Struct, frozen=True):
    artifact: str
    """SHA-256 of the artifact's manifest."""
    data: str
    """Digest of the data set."""
    start: str
    """Digest of the adapter and the seed that they were measured with."""
    effects: list[float]


def _is_of(kept: _Kept, wanted: _Kept, *, goes_on: bool) -> bool:
    same = (kept.artifact, kept.data) == (wanted.artifact, wanted.data)
    return same and (goes_on or kept.start == wanted.start)


def _cosines(
    engine: Engine, dataset: Dataset, indices: Indices, adapter: Arrays, rows: Rows, num_layers: int
) -> NDArray[np.float64]:
    """Cosines (layers, answers) of a batch's answers without each layer to those with all."""
    answers = [_answers(engine, dataset, indices, adapter, rows, plan) for plan in _plans(num_layers)]
    return np.stack([_cosine(answer, answers[0]) for answer in answers[1:]])


def _plans(num_layers: int) -> Iterator[LayerPlan]:
    """All layers, then all but each."""
    yield dropping(num_layers, ())
    yield from (dropping(num_layers, {layer}) for layer in range(num_layers))


def _answers(
    engine: Engine, dataset: Dataset, indices: Indices, adapter: Arrays, rows: Rows, plan: LayerPlan
) -> NDArray[np.float64]:
    """Logits (answers, classes) of the rows, or of those of their tokens that count."""
    manifest = engine.artifact.manifest
    batch, counted = dataset.rows(indices), manifest.counted
    if manifest.head.targets and manifest.head.targets.shift:
        last = np.minimum(dataset.lengths[indices], dataset.width_of(indices)) - 1
        return np.asarray(engine.predict_at(batch, adapter, last, rows=rows, plan=plan), np.float64)
    logits = np.asarray(engine.predict(batch, adapter, rows=rows, plan=plan), np.float64)
    if counted is None:
        return logits.reshape(len(indices), -1)
    return np.asarray(logits[shifted(batch[manifest.label_name], counted) != counted.ignored])


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of each row; of two zeros 1, of one 0."""
    dots, squares = (a * b).sum(-1), (a * a).sum(-1) * (b * b).sum(-1)
    found = np.divide(dots, np.sqrt(squares), out=np.zeros_like(dots), where=squares != 0)
    return np.where((a == b).all(-1), 1.0, found)
