"""``fleetune predict``: the personalised model at work on the device."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.commands.evaluating import Counted, counter_of, described, write_evaluation
from fleetune.device_runtime.contracts.adapters import load_peft
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.evaluation_file import EvaluationFile
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.run_file import find_adapter, read_seq_len
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.loading import load_dataset, read_texts, text_dataset
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.data.sequences import Sequences
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.pulls import sigmoid
from fleetune.device_runtime.errors import ArtifactError, ConfigError, choices
from fleetune.device_runtime.training.evaluation import Evaluation, evaluate
from fleetune.device_runtime.training.label_sets import LabelSets
from fleetune.device_runtime.training.metrics import Doubles
from fleetune.device_runtime.training.regression import Regression

log = logging.getLogger(__name__)

_LANGUAGE = "causal-lm"
_TASKS = ("sequence-classification", "image-classification", "audio-classification")
_UNTRAINED = "no run and no adapter given: these answers are of version 0, which is not trained"


class Prediction(msgspec.Struct, frozen=True):
    """The likeliest label, its probability, and the text or the file it is of (None where the data has neither)."""

    label: str
    score: float
    text: str | None = None


class LabelSetPrediction(msgspec.Struct, frozen=True):
    """Labels of a probability of 0.5 and more, the probability of each, and the text or file as of :class:`Prediction`."""

    labels: list[str]
    scores: dict[str, float]
    text: str | None = None


class NumberPrediction(msgspec.Struct, frozen=True):
    """The number of each output, and the text or the file as of :class:`Prediction`."""

    values: dict[str, float]
    text: str | None = None


AnyPrediction = Prediction | LabelSetPrediction | NumberPrediction


class Answered(NamedTuple):
    """How many samples have been answered, and how many there are."""

    done: int
    total: int


def predict(
    artifact_dir: Path | str,
    *,
    text: str | Sequence[str] | None = None,
    data: Path | str | None = None,
    columns: Columns = Columns(),
    sequences: Sequences = Sequences(),
    run: Path | str | None = None,
    adapter: Path | str | None = None,
    out: Path | str | None = None,
    batch_size: int = 32,
    threads: int = 0,
    on_note: Callable[[str], object] | None = None,
    on_progress: Callable[[Answered], object] | None = None,
) -> list[AnyPrediction]:
    """Answer texts or samples at full depth, in their order, cut where the run cut them (else where the model does).

    A causal language model is measured on ``data``, into ``out``; it has no predictions to return.

    Args:
        artifact_dir: folder made by ``fleetune export``.
        text: one text or several; or else
        data: a file or folder as for training; labels in it are looked at only with ``out``.
        columns: where the data's rows have the text, and with ``out`` the label.
        sequences: how the texts of a causal language model become sequences.
        run: folder that ``train``, ``aggregate`` or ``demo`` wrote, whose ``adapter/`` is used; or else
        adapter: a PEFT folder. With neither, the artifact's own version 0.
        out: folder for ``evaluation.json`` and ``evaluation.csv``, made from the labels in ``data``; None for none.
        batch_size: samples at a time.
        threads: for the kernels; 0 for one a core.
        on_note: called with what a person may want to know of the answers.
        on_progress: called after every batch.

    Raises:
        ConfigError: both or neither of ``text`` and ``data``, both ``run`` and ``adapter``, ``out`` without ``data``, or a task
            without classes.
        ArtifactError, DataError: what is read does not fit.
    """
    _check_choices(text=text, data=data, run=run, adapter=adapter, out=out)
    artifact = open_artifact(artifact_dir)
    _check_task(artifact.manifest, is_measured=out is not None)
    folder = _adapter_folder(run, adapter)
    weights = load_peft(folder, artifact.manifest) if folder else artifact.adapter()
    if folder is None and on_note:
        on_note(_UNTRAINED)
    seq_len, labelled = _seq_len(artifact, folder), out is not None
    texts, dataset = _read(artifact, text, data, columns, sequences, seq_len=seq_len, labelled=labelled)
    if dataset.cut:
        (on_note or log.warning)(str(dataset.cut))
    with open_engine(artifact, threads=threads) as engine:
        if artifact.manifest.task == _LANGUAGE and out is not None:
            measured = evaluate(engine, dataset, weights, batch_size=batch_size)
            _write(described(measured, None, artifact.manifest, data=str(data)), Path(out), on_note)
            return []
        logits = _logits(
            engine, dataset, weights, batch_size=batch_size, tell=on_progress or (lambda _: None)
        )
    answers = logits if artifact.manifest.problem_type else _log_scores(logits)
    if out is not None:
        judged = _judged(answers, dataset, artifact.manifest)
        _write(described(*judged, artifact.manifest, data=str(data)), Path(out), on_note)
    return list(_named(answers, artifact.manifest, texts))


def _check_task(manifest: Manifest, *, is_measured: bool) -> None:
    if manifest.task in _TASKS or (manifest.task == _LANGUAGE and is_measured):
        return
    raise ConfigError(
        f"predict works for {choices(_TASKS)}; this artifact is for {manifest.task}: `train --eval` measures it"
        + (", as --data with --out does here" if manifest.task == _LANGUAGE else "")
        + ", and `merge --full` writes a model that transformers runs"
    )


def _write(found: EvaluationFile, out: Path, on_note: Callable[[str], object] | None) -> None:
    write_evaluation(out, found)
    (on_note or log.info)(f"{found}; see {out}")


def _check_choices(**given: object) -> None:
    if (given["text"] is None) == (given["data"] is None):
        raise ConfigError("predict needs either a text or a data file")
    if given["run"] is not None and given["adapter"] is not None:
        raise ConfigError("predict takes either a run or an adapter folder, got both")
    if given["out"] is not None and given["data"] is None:
        raise ConfigError(
            "an output folder (--out) is for figures of labelled data: give a data file (--data)"
        )


def _adapter_folder(run: Path | str | None, adapter: Path | str | None) -> Path | None:
    if run is not None:
        return find_adapter(Path(run))
    return None if adapter is None else Path(adapter)


def _seq_len(artifact: Artifact, folder: Path | None) -> int:
    """Tokens after which text is cut: as in the run that the adapter is of, else the tokenizer's own limit."""
    tokenizer = artifact.manifest.tokenizer
    return (read_seq_len(folder.parent) if folder else 0) or (tokenizer.max_length if tokenizer else 1)


def _read(
    artifact: Artifact,
    text: str | Sequence[str] | None,
    data: Path | str | None,
    columns: Columns,
    sequences: Sequences,
    *,
    seq_len: int,
    labelled: bool,
) -> tuple[Sequence[str | None], Dataset]:
    manifest, folder = artifact.manifest, artifact.folder
    if text is not None:
        texts = [text] if isinstance(text, str) else list(text)
        return texts, text_dataset(texts, manifest, folder, seq_len=seq_len)
    path = Path(data or "")
    dataset = load_dataset(
        path, manifest, folder, seq_len=seq_len, labelled=labelled, columns=columns, sequences=sequences
    )
    if path.suffix == ".npz" or manifest.task == _LANGUAGE:
        return [None] * dataset.num_samples, dataset
    return read_texts(path, columns=columns), dataset


def _logits(
    engine: Engine,
    dataset: Dataset,
    weights: Arrays,
    *,
    batch_size: int,
    tell: Callable[[Answered], object],
) -> Array:
    """Logits (num_samples, classes) in the data's order."""
    batches = dataset.ordered_batches(batch_size)
    rows = engine.rows(min(batch_size, dataset.num_samples), dataset.mean_tokens)
    found, done = [], 0
    for some in batches:
        found.append(engine.predict(dataset.rows(some), weights, rows=rows))
        done += len(some)
        tell(Answered(done, dataset.num_samples))
    results = np.concatenate(found)
    if not np.isfinite(results).all():
        raise ArtifactError(
            "the model's answers are not finite: NaN in its frozen weights, or an adapter that ran away"
        )
    logits = np.empty_like(results)
    logits[np.concatenate(batches)] = results
    return logits


def _judged(answers: Array, dataset: Dataset, manifest: Manifest) -> tuple[Evaluation, Counted | None]:
    """Logarithms of probabilities, or logits of a problem type, (num_samples, outputs), against the labels, as in ``train``."""
    counted = counter_of(manifest)
    if isinstance(counted, LabelSets | Regression):
        return _judged_outputs(answers, dataset, manifest, counted), counted
    labels, likeliest = dataset.labels, np.asarray(answers.argmax(-1))
    if counted:
        counted.add(likeliest, labels)
    loss = -float(answers[np.arange(len(answers)), labels].mean())
    return Evaluation(loss, float((likeliest == labels).mean()), len(answers)), counted


def _judged_outputs(
    logits: Array, dataset: Dataset, manifest: Manifest, counted: LabelSets | Regression
) -> Evaluation:
    """As :func:`_judged`, of numbers or label sets, which are ``counted`` too."""
    column = dataset.rows(np.arange(dataset.num_samples))[manifest.label_name]
    z, y = logits.astype(np.float64), column.reshape(logits.shape).astype(np.float64)
    losses = np.square(z - y) if manifest.problem_type == "regression" else np.logaddexp(0, z) - z * y
    counted.add(logits, column)
    return Evaluation(float(losses.mean()), counted.score, len(logits))


def _log_scores(logits: Array) -> Doubles:
    """Logarithms of the probabilities, float64 (num_samples, classes)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: Doubles = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def _named(answers: Array, manifest: Manifest, texts: Sequence[str | None]) -> Iterator[AnyPrediction]:
    labels = manifest.labels
    if manifest.problem_type == "regression":
        for row, text in zip(answers.astype(float).tolist(), texts, strict=True):
            yield NumberPrediction(dict(zip(labels, row, strict=True)), text)
    elif manifest.problem_type:
        for row, text in zip(sigmoid(answers.astype(float)).tolist(), texts, strict=True):
            scores = dict(zip(labels, row, strict=True))
            yield LabelSetPrediction([name for name, score in scores.items() if score >= 0.5], scores, text)
    else:
        for scores_of_row, text in zip(np.exp(answers), texts, strict=True):
            yield Prediction(labels[int(scores_of_row.argmax())], float(scores_of_row.max()), text)
