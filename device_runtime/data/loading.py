"""Data files to data sets: lines of text through the tokenizer, or arrays as they are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.data.npz import load_npz
from fleetune.device_runtime.data.records import (
    Label,
    LabelledText,
    LabelledTokens,
    Source,
    Text,
    Tokens,
    read_records,
)
from fleetune.device_runtime.data.samples import IGNORED, Column, Dataset, Dense, Ragged, make_dataset
from fleetune.device_runtime.data.text import (
    Encoded,
    encode_texts,
    encode_words,
    first_tokens,
    load_tokenizer,
)
from fleetune.device_runtime.errors import ArtifactError, DataError

__all__ = ["Dataset", "load_dataset", "text_dataset"]

Records = Sequence[tuple[Source, Any]]


def load_dataset(
    path: Path | str, manifest: Manifest, folder: Path | str, *, seq_len: int, labelled: bool = True
) -> Dataset:
    """Read a data file for a model.

    Args:
        path: ``.jsonl`` or ``.csv`` (also ``.gz``) with ``text``, ``label`` (a class index or name) and perhaps
            ``text_b``; for token classification ``tokens`` and ``labels``; for a causal language model ``text`` alone;
            or ``.npz`` with the model's input arrays and ``labels``.
        manifest: names the inputs, the classes and the tokenizer.
        folder: the artifact's folder, where the tokenizer file is.
        seq_len: text is cut after so many tokens (and at the tokenizer's own limit).
        labelled: False reads the inputs alone.

    Raises:
        DataError: the file does not say what it should; the message names the file and the line.
        ConfigError: ``seq_len`` leaves no room for text, or the ``tokenizers`` library is missing.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return load_npz(path, manifest, seq_len=seq_len, labelled=labelled)
    task = _text_task(manifest, path)
    records = list(read_records(path, task.labelled if labelled else task.plain))
    return _tokenise(records, manifest, Path(folder), seq_len=seq_len, labelled=labelled)


def text_dataset(texts: Sequence[str], manifest: Manifest, folder: Path | str, *, seq_len: int) -> Dataset:
    """Texts without labels as a data set, in their order; errors as :func:`load_dataset`."""
    if not texts:
        raise DataError("no text given")
    records = [(Source(None, i), Text(text)) for i, text in enumerate(texts, 1)]
    return _tokenise(records, manifest, Path(folder), seq_len=seq_len, labelled=False)


class _TextTask(NamedTuple):
    plain: type
    labelled: type
    encode: Callable[[Any, Records], Encoded]
    label: Callable[[Records, Encoded, Manifest], Column]
    num_tokens_min: int


def _text_task(manifest: Manifest, path: Path | None) -> _TextTask:
    task = _TEXT_TASKS.get(manifest.task)
    if task is None or manifest.tokenizer is None:
        reason = f"task {manifest.task!r}" if task is None else "an artifact without a tokenizer"
        raise DataError(f"{path or 'text'}: {reason} takes .npz files of arrays, not text")
    return task


def _tokenise(records: Records, manifest: Manifest, folder: Path, *, seq_len: int, labelled: bool) -> Dataset:
    task, tokenizer = _text_task(manifest, records[0][0].path), manifest.tokenizer
    if tokenizer is None:
        raise ArtifactError(f"{folder}: no tokenizer in the artifact")
    engine = load_tokenizer(folder / tokenizer.file, max_length=min(seq_len, tokenizer.max_length))
    encoded = task.encode(engine, records)
    _check_lengths(records, encoded, task)
    columns = _columns(encoded, manifest)
    if labelled:
        columns[manifest.label_name] = task.label(records, encoded, manifest)
    return make_dataset(
        columns,
        encoded.lengths,
        seq_len=seq_len,
        num_classes=len(manifest.labels),
        label_name=manifest.label_name if labelled else "",
    )


def _check_lengths(records: Records, encoded: Encoded, task: _TextTask) -> None:
    for (source, _), length in zip(records, encoded.lengths.tolist(), strict=True):
        if length < task.num_tokens_min:
            raise source.error(f"{length} tokens, expected at least {task.num_tokens_min}")


def _columns(encoded: Encoded, manifest: Manifest) -> dict[str, Column]:
    made: dict[str, Array] = {
        "input_ids": encoded.ids,
        "attention_mask": np.ones(len(encoded.ids), np.uint8),
        "token_type_ids": encoded.types,
    }
    wanted = manifest.features
    if unknown := [row.name for row in wanted if row.name not in made]:
        raise DataError(f"the model takes {', '.join(unknown)}, which text does not give: bring an .npz file")
    return {row.name: Ragged(made[row.name], encoded.lengths, row.pad, row.dtype) for row in wanted}


def _encode_texts(engine: Any, records: Records) -> Encoded:
    for source, record in records:
        if not record.text.strip():
            raise source.error("the text is empty")
    return encode_texts(engine, [r.text for _, r in records], [r.text_b for _, r in records])


def _encode_words(engine: Any, records: Records) -> Encoded:
    for source, record in records:
        if not record.tokens:
            raise source.error("no tokens")
    return encode_words(engine, [r.tokens for _, r in records])


def _label_classes(records: Records, encoded: Encoded, manifest: Manifest) -> Column:
    return Dense(np.array([_class_of(r.label, manifest.labels, source) for source, r in records], np.int64))


def _label_next_tokens(records: Records, encoded: Encoded, manifest: Manifest) -> Column:
    """The ids themselves: the loss shifts them inside the graph."""
    return Ragged(encoded.ids, encoded.lengths, IGNORED, "int64")


def _label_words(records: Records, encoded: Encoded, manifest: Manifest) -> Column:
    """Each word's class on its first token, nothing on the others."""
    classes = [_word_classes(record, manifest, source) for source, record in records]
    starts = np.cumsum([0, *(len(row) for row in classes)])[:-1]
    of_token = np.repeat(starts, encoded.lengths) + encoded.words
    first = first_tokens(encoded)
    values = np.full(len(encoded.ids), IGNORED, np.int64)
    values[first] = np.concatenate(classes)[of_token[first]]
    return Ragged(values, encoded.lengths, IGNORED, "int64")


def _word_classes(record: LabelledTokens, manifest: Manifest, source: Source) -> list[int]:
    if len(record.labels) != len(record.tokens):
        raise source.error(f"{len(record.tokens)} tokens but {len(record.labels)} labels")
    return [_class_of(label, manifest.labels, source) for label in record.labels]


def _class_of(label: Label, names: tuple[str, ...], source: Source) -> int:
    """A label as a class index: a name first, then a number (CSV knows only strings)."""
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        if not label.isdecimal():
            shown = ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")
            raise source.error(f"no label {label!r}; have: {shown}")
    if not 0 <= int(label) < len(names):
        raise source.error(f"label {label} out of range; expected 0 to {len(names) - 1}")
    return int(label)


_TEXT_TASKS = {
    "sequence-classification": _TextTask(Text, LabelledText, _encode_texts, _label_classes, 1),
    "causal-lm": _TextTask(Text, Text, _encode_texts, _label_next_tokens, 2),
    "token-classification": _TextTask(Tokens, LabelledTokens, _encode_words, _label_words, 1),
}
