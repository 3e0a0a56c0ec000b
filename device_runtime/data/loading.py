"""Data files to data sets: lines of text through the tokenizer, or arrays as they are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.data.answers import labelled_kind, read_answers
from fleetune.device_runtime.data.columns import REMEDY, Columns
from fleetune.device_runtime.data.folders import files_in, load_folder
from fleetune.device_runtime.data.labels import class_reader
from fleetune.device_runtime.data.language import Read, read_sequences
from fleetune.device_runtime.data.npz import load_npz
from fleetune.device_runtime.data.records import (
    Label,
    LabelledText,
    LabelledTokens,
    Text,
    Tokens,
    is_saved,
    read_records,
)
from fleetune.device_runtime.data.rows import Source
from fleetune.device_runtime.data.samples import IGNORED, Column, Cut, Dataset, Dense, Ragged, make_dataset
from fleetune.device_runtime.data.sequences import Sequences
from fleetune.device_runtime.data.text import (
    Encoded,
    Engine,
    encode_texts,
    encode_words,
    first_tokens,
    load_tokenizer,
)
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError

__all__ = ["Dataset", "load_dataset", "text_dataset"]

_LANGUAGE = "causal-lm"
Records = Sequence[tuple[Source, Any]]
Made = dict[str, NDArray[Any]]
"""What text gives, by the name of the input."""


def load_dataset(
    path: Path | str,
    manifest: Manifest,
    folder: Path | str,
    *,
    seq_len: int,
    labelled: bool = True,
    columns: Columns = Columns(),
    sequences: Sequences = Sequences(),
) -> Dataset:
    """Read a data file for a model.

    Args:
        path: a file of rows (:func:`read_records`) with ``text``, ``label`` (as :mod:`labels` reads it) and perhaps
            ``text_b``, or numbers or several labels (as :mod:`answers` reads them); for token classification ``tokens`` and
            ``labels``; for a causal language model ``messages``, or ``prompt`` and ``completion``, or ``text``, or a plain
            text file (:func:`read_sequences`);
            or ``.npz`` with the model's input arrays and ``labels``; or a folder by class (:func:`load_folder`).
        manifest: names the inputs, the classes and the tokenizer.
        folder: the artifact's folder, where the tokenizer file is.
        seq_len: text is cut to so many tokens, or to as many as the model takes; arrays are taken whole or refused.
        labelled: False reads the inputs alone.
        columns: where rows have the text and the label.
        sequences: how the texts of a causal language model become sequences; they are packed by :func:`packed`, not here.

    Raises:
        DataError: the file does not say what it should; the message names the file and the line.
        ConfigError: ``seq_len`` leaves no room for text, or the ``tokenizers`` library is missing.
    """
    path = Path(path)
    if sequences != Sequences() and (manifest.task != _LANGUAGE or path.suffix == ".npz"):
        given = [
            name
            for name in Sequences.__struct_fields__
            if getattr(sequences, name) != getattr(Sequences(), name)
        ]
        raise ConfigError(f"{', '.join(given)}: only for texts of a causal language model, not for {path}")
    if is_folder_by_class(path):
        return load_folder(path, manifest, Path(folder), seq_len=seq_len, labelled=labelled)
    if path.suffix == ".npz":
        return load_npz(
            path, manifest, seq_len=seq_len, length_max=length_max_of(manifest), labelled=labelled
        )
    task = _text_task(manifest, path)
    if manifest.task == _LANGUAGE:
        return _language(path, manifest, Path(folder), seq_len, labelled, columns, sequences)
    kind: type[msgspec.Struct] = task.labelled if labelled else task.plain
    records = list(read_records(path, columns.of(kind), remedy=REMEDY))
    return _tokenise(records, manifest, Path(folder), seq_len=seq_len, labelled=labelled)


def read_texts(path: Path, *, columns: Columns = Columns()) -> list[str]:
    """What :func:`load_dataset` reads samples of, in their order: texts, or the files of a folder."""
    if is_folder_by_class(path):
        return [str(file.relative_to(path)) for file in files_in(path)]
    return [record.text for _, record in read_records(path, columns.of(Text))]


def is_folder_by_class(path: Path) -> bool:
    """Whether a folder is none that ``datasets`` saved."""
    return path.is_dir() and not is_saved(path)


def text_dataset(texts: Sequence[str], manifest: Manifest, folder: Path | str, *, seq_len: int) -> Dataset:
    """Texts without labels as a data set, in their order; errors as :func:`load_dataset`."""
    if not texts:
        raise DataError("no text given")
    records = [(Source(None, i), Text(text)) for i, text in enumerate(texts, 1)]
    return _tokenise(records, manifest, Path(folder), seq_len=seq_len, labelled=False)


class _TextTask(NamedTuple):
    plain: type
    labelled: type
    encode: Callable[[Engine, Records], Encoded]
    label: Callable[[Records, Encoded, Manifest], Column]
    num_tokens_min: int


def _text_task(manifest: Manifest, path: Path | None) -> _TextTask:
    task = _TEXT_TASKS.get(manifest.task)
    if task is None or manifest.tokenizer is None:
        reason = f"task {manifest.task!r}" if task is None else "an artifact without a tokenizer"
        raise DataError(f"{path or 'text'}: {reason} takes .npz files of arrays, not text")
    return (
        task._replace(labelled=labelled_kind(manifest), label=_label_answers)
        if manifest.problem_type
        else task
    )


def _tokenise(records: Records, manifest: Manifest, folder: Path, *, seq_len: int, labelled: bool) -> Dataset:
    task = _text_task(manifest, records[0][0].path)
    engine, length_max = _engine(manifest, folder, seq_len)
    length = engine.max_length
    encoded = task.encode(engine, records)
    _check_lengths(records, encoded, task)
    arrays = _made(encoded.ids, encoded.types)
    _check_ids([source for source, _ in records], encoded.lengths, arrays, manifest, engine)
    columns = _columns(encoded.lengths, arrays, manifest)
    if labelled:
        columns[manifest.label_name] = task.label(records, encoded, manifest)
    return make_dataset(
        columns,
        encoded.lengths,
        seq_len=seq_len,
        num_classes=len(manifest.labels),
        label_name=manifest.label_name if labelled else "",
        width_max=length,
        cut=_cut(encoded, source=str(records[0][0].path or "text"), length=length, length_max=length_max),
    )


def _language(
    path: Path,
    manifest: Manifest,
    folder: Path,
    seq_len: int,
    labelled: bool,
    columns: Columns,
    options: Sequences,
) -> Dataset:
    """A file for a causal language model, as :func:`load_dataset`."""
    engine, length_max = _engine(manifest, folder, seq_len)
    read = read_sequences(
        path,
        manifest,
        folder,
        engine,
        length_max=length_max,
        labelled=labelled,
        columns=columns,
        options=options,
    )
    lengths = np.array([len(one.ids) for one in read.samples], np.int64)
    arrays = _joined(read)
    _check_ids(read.sources, lengths, arrays, manifest, engine)
    made = _columns(lengths, arrays, manifest)
    if labelled:
        labels = np.concatenate([one.labels for one in read.samples])
        made[manifest.label_name] = Ragged(labels, lengths, IGNORED, "int64")
    return make_dataset(
        made,
        lengths,
        seq_len=seq_len,
        num_classes=len(manifest.labels),
        label_name=manifest.label_name if labelled else "",
        width_max=engine.max_length,
        cut=read.cut,
    )


def _engine(manifest: Manifest, folder: Path, seq_len: int) -> tuple[Engine, int]:
    """The artifact's tokenizer, which cuts where run and model do, and the most tokens that the model takes."""
    tokenizer = manifest.tokenizer
    if tokenizer is None:
        raise ArtifactError(f"{folder}: no tokenizer in the artifact")
    length_max = length_max_of(manifest) or seq_len
    length = min(seq_len, length_max)
    return load_tokenizer(
        folder / tokenizer.file, max_length=length, side=tokenizer.truncation_side
    ), length_max


def _joined(read: Read) -> Made:
    ids = np.concatenate([one.ids for one in read.samples])
    return _made(ids, np.concatenate([one.types for one in read.samples]))


def length_max_of(manifest: Manifest) -> int:
    """The most tokens that tokenizer and model take; 0 where neither says."""
    tokenizer, positions = manifest.tokenizer, manifest.bounds.get("seq", 0)
    known = [length for length in (tokenizer.max_length if tokenizer else 0, positions) if length]
    return min(known, default=0)


def _cut(encoded: Encoded, *, source: str, length: int, length_max: int) -> Cut | None:
    lost = encoded.uncut - encoded.lengths
    if not lost.any():
        return None
    rows, tokens = int((lost > 0).sum()), int(encoded.uncut.sum())
    return Cut(source, rows, len(lost), int(lost.sum()), tokens, length, length_max)


def _check_lengths(records: Records, encoded: Encoded, task: _TextTask) -> None:
    for (source, _), length in zip(records, encoded.lengths.tolist(), strict=True):
        if length < task.num_tokens_min:
            raise source.error(f"{length} tokens, expected at least {task.num_tokens_min}")


def _check_ids(
    sources: Sequence[Source], lengths: NDArray[np.int64], made: Made, manifest: Manifest, engine: Engine
) -> None:
    """Refuse what the model's tables have no row for: an added token, or the second text of a pair."""
    ends = np.cumsum(lengths)
    for row in manifest.features:
        if not row.below or row.name not in made:
            continue
        values = made[row.name]
        wrong = np.flatnonzero(values >= row.below)
        if wrong.size:
            source = sources[int(np.searchsorted(ends, wrong[0], side="right"))]
            raise source.error(id_problem(row.name, int(values[wrong[0]]), row.below, engine))


def id_problem(name: str, number: int, below: int, engine: Engine) -> str:
    """What is told of an id for which the model has no row."""
    if name != "input_ids":
        return f"{name} {number}, the model knows 0 to {below - 1}"
    return (
        f"the token {engine.token_of(number)!r} is id {number}, the model knows 0 to {below - 1}; leave it out of the text, "
        "or give the model a row for it (resize_token_embeddings) and export again"
    )


def _made(ids: NDArray[np.int32], types: NDArray[np.uint8]) -> Made:
    return {"input_ids": ids, "attention_mask": np.ones(len(ids), np.uint8), "token_type_ids": types}


def _columns(lengths: NDArray[np.int64], made: Made, manifest: Manifest) -> dict[str, Column]:
    wanted = manifest.features
    if unknown := [row.name for row in wanted if row.name not in made]:
        raise DataError(f"the model takes {', '.join(unknown)}, which text does not give: bring an .npz file")
    return {row.name: Ragged(made[row.name], lengths, row.pad, row.dtype) for row in wanted}


def _encode_texts(engine: Engine, records: Records) -> Encoded:
    for source, record in records:
        if not record.text.strip():
            raise source.error("the text is empty")
    return encode_texts(engine, [r.text for _, r in records], [r.text_b for _, r in records])


def _encode_words(engine: Engine, records: Records) -> Encoded:
    for source, record in records:
        if not record.tokens:
            raise source.error("no tokens")
    return encode_words(engine, [r.tokens for _, r in records])


def _label_classes(records: Records, encoded: Encoded, manifest: Manifest) -> Column:
    read = class_reader(manifest.labels)
    return Dense(np.array([read(record.label, source) for source, record in records], np.int64))


def _label_answers(records: Records, encoded: Encoded, manifest: Manifest) -> Column:
    return Dense(read_answers(records, manifest))


def _label_next_tokens(records: Records, encoded: Encoded, manifest: Manifest) -> Column:
    """The ids themselves: the loss shifts them inside the graph."""
    return Ragged(encoded.ids, encoded.lengths, IGNORED, "int64")


def _label_words(records: Records, encoded: Encoded, manifest: Manifest) -> Column:
    """Each word's class on its first token, nothing on the others, nor on words labelled -100.

    Raises:
        DataError: no such class, or no label at all.
    """
    read = _word_reader(manifest.labels)
    classes = [_word_classes(record, read, source) for source, record in records]
    starts = np.cumsum([0, *(len(row) for row in classes)])[:-1]
    of_token = np.repeat(starts, encoded.lengths) + encoded.words
    first = first_tokens(encoded)
    values = np.full(len(encoded.ids), IGNORED, np.int64)
    values[first] = np.concatenate(classes)[of_token[first]]
    if (values == IGNORED).all():
        raise DataError(f"{records[0][0].path}: all words are labelled {IGNORED}, and count for nothing")
    return Ragged(values, encoded.lengths, IGNORED, "int64")


def _word_reader(names: Sequence[str]) -> Callable[[Label, Source], int]:
    """As ``class_reader``; -100 means no label, as in torch, unless a class is named so."""
    read = class_reader(names)
    if str(IGNORED) in names:
        return read
    return lambda label, source: IGNORED if str(label) == str(IGNORED) else read(label, source)


def _word_classes(record: LabelledTokens, read: Callable[[Label, Source], int], source: Source) -> list[int]:
    if len(record.labels) != len(record.tokens):
        raise source.error(f"{len(record.tokens)} tokens but {len(record.labels)} labels")
    return [read(label, source) for label in record.labels]


_TEXT_TASKS = {
    "sequence-classification": _TextTask(Text, LabelledText, _encode_texts, _label_classes, 1),
    _LANGUAGE: _TextTask(Text, Text, _encode_texts, _label_next_tokens, 2),
    "token-classification": _TextTask(Tokens, LabelledTokens, _encode_words, _label_words, 1),
}
