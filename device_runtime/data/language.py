"""Rows for a causal language model as sequences of tokens, each with what it is to answer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.data.chat import Chat, open_chat
from fleetune.device_runtime.data.columns import LANGUAGE_REMEDY, Columns
from fleetune.device_runtime.data.conversations import Written, written
from fleetune.device_runtime.data.records import (
    LANGUAGE_FORMS,
    Conversation,
    Language,
    Pair,
    Text,
    is_document,
    read_document,
    read_records,
)
from fleetune.device_runtime.data.rows import Source
from fleetune.device_runtime.data.samples import IGNORED, Cut
from fleetune.device_runtime.data.sequences import CUT, Sequences
from fleetune.device_runtime.data.text import Engine, Whole, encode_whole
from fleetune.device_runtime.errors import ConfigError, DataError

TOKENS_MIN = 2
"""Of one token nothing follows."""


class Sample(NamedTuple):
    """One sequence: ``ids`` and ``labels`` int32 (IGNORED where nothing counts), ``types`` uint8, all (length,)."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    types: NDArray[np.uint8]

    @property
    def counts(self) -> bool:
        """Whether any token that follows another is to be learned."""
        return bool((self.labels[1:] != IGNORED).any())


class Read(NamedTuple):
    """Samples with the row that each is of, and what was cut off."""

    samples: list[Sample]
    sources: list[Source]
    cut: Cut | None


class _Fit(NamedTuple):
    """How long sequences are, and how they are made of texts that are longer or shorter."""

    length: int
    overlap: int
    side: str
    start: int | None
    """Id of the token that a text begins with, where a template writes it."""
    end: int | None
    """Id of the token that is put after a text; None for none."""


def read_sequences(
    path: Path,
    manifest: Manifest,
    folder: Path,
    engine: Engine,
    *,
    length_max: int,
    labelled: bool,
    columns: Columns,
    options: Sequences,
) -> Read:
    """Read a file of chats, prompts with completions, or texts.

    Args:
        path: a file of rows, or a plain text, which is one document.
        manifest: has the chat template and the end of text.
        folder: the artifact's.
        engine: its tokenizer, with the longest sequence.
        length_max: the most tokens that the model takes, for messages.
        labelled: False keeps sequences in which nothing is to be learned.
        columns: where the rows have what.
        options: how texts become sequences.

    Raises:
        DataError, ArtifactError: as :func:`written`; no sequence in which anything is to be learned.
        ConfigError: an overlap that leaves no room, or jinja2 is missing.
    """
    is_whole = is_document(path)
    fit = _fit(manifest, engine, options, is_split=is_whole)
    texts = list(_documents(path) if is_whole else _texts(path, manifest, folder, columns, options))
    made, sources = [], []
    lost = _Lost()
    for (source, one), tokens in zip(texts, _encoded(engine, texts), strict=True):
        whole = _ended(tokens, one, fit.end)
        if len(whole.ids) < TOKENS_MIN:
            raise source.error(f"{len(whole.ids)} tokens, expected at least {TOKENS_MIN}")
        parts = list(_parts(whole, tokens, one, fit))
        kept = [part for part in parts if part.counts or not labelled]
        lost.note(len(whole.ids), 0 if fit.overlap != CUT else fit.length, unanswered=not kept)
        made += kept
        sources += [source] * len(kept)
    if not made:
        raise DataError(
            f"{path}: no answer begins within the first {fit.length} tokens of any row; raise --seq-len, or split the rows with "
            "--overlap"
        )
    return Read(made, sources, lost.cut(path, fit.length, length_max))


class _Lost:
    """What is counted of texts that are too long."""

    def __init__(self) -> None:
        self._cut = self._rows = self._tokens_lost = self._tokens = self._unanswered = 0

    def note(self, tokens: int, length: int, *, unanswered: bool) -> None:
        """Count a text; ``length`` 0 is without end."""
        beyond = max(0, tokens - length) if length else 0
        self._rows, self._tokens = self._rows + 1, self._tokens + tokens
        self._cut, self._tokens_lost = self._cut + bool(beyond), self._tokens_lost + beyond
        self._unanswered += unanswered

    def cut(self, path: Path, length: int, length_max: int) -> Cut | None:
        """Return what a person is told; None if nothing is lost."""
        if not self._cut and not self._unanswered:
            return None
        return Cut(
            str(path),
            self._cut,
            self._rows,
            self._tokens_lost,
            self._tokens,
            length,
            length_max,
            num_unanswered=self._unanswered,
        )


def _fit(manifest: Manifest, engine: Engine, options: Sequences, *, is_split: bool) -> _Fit:
    options.check()
    tokenizer = manifest.tokenizer
    names = tokenizer.special_tokens if tokenizer else {}
    start, end = (engine.id_of(names[name]) if name in names else None for name in ("bos_token", "eos_token"))
    overlap = max(1, options.overlap) if is_split else options.overlap
    return _Fit(engine.max_length, overlap, engine.side, start, end if options.end_of_text else None)


def _documents(path: Path) -> Iterator[tuple[Source, Written]]:
    for source, text in read_document(path):
        yield source, Written(text, is_plain=True, ends=True)


def _texts(
    path: Path, manifest: Manifest, folder: Path, columns: Columns, options: Sequences
) -> Iterator[tuple[Source, Written]]:
    with ExitStack() as stack:
        opened: list[Chat] = []

        def chat() -> Chat:
            if not opened:
                opened.append(stack.enter_context(open_chat(manifest, folder)))
            return opened[0]

        kind = _kind(columns)
        forms = LANGUAGE_FORMS if kind is Language else ()
        for source, found in read_records(path, columns.of(kind), remedy=LANGUAGE_REMEDY, one_of=forms):
            row = Language(**msgspec.structs.asdict(found))
            for one in written(row, source, chat, loss_on=options.loss_on):
                yield source, one


def _kind(columns: Columns) -> type[msgspec.Struct]:
    """What a row is: what the columns that are named hold, or whatever is there."""
    if columns.messages_column:
        return Conversation
    if columns.prompt_column or columns.completion_column:
        return Pair
    return Text if columns.text_column else Language


def _encoded(engine: Engine, texts: Sequence[tuple[Source, Written]]) -> Iterator[Whole]:
    for is_plain, run in groupby((one for _, one in texts), key=lambda one: one.is_plain):
        yield from encode_whole(engine, [(one.text, one.pair) for one in run], is_plain=is_plain)


def _ended(tokens: Whole, one: Written, end: int | None) -> Sample:
    """The whole text with its labels, and the end of text where it belongs and is not there."""
    ids, types = tokens.ids, tokens.types
    counted = np.ones(len(ids), bool) if one.answers is None else _inside(tokens, one.answers)
    if one.ends and end is not None and len(ids):
        if ids[-1] != end:
            ids, types, counted = (
                np.append(ids, np.int32(end)),
                np.append(types, types[-1]),
                np.append(counted, True),
            )
        elif tokens.is_special[-1]:
            counted[-1] = True
    return Sample(ids, np.where(counted, ids, np.int32(IGNORED)).astype(np.int32), types)


def _inside(tokens: Whole, spans: Iterable[tuple[int, int]]) -> NDArray[np.bool_]:
    """Whether each token has a character in one of the spans.

    Source: apply_chat_template(return_assistant_tokens_mask) of transformers.
    """
    found = np.zeros(len(tokens.ids), bool)
    for start, end in spans:
        found |= (tokens.starts < end) & (tokens.ends > start) & ~tokens.is_special
    return found


def _parts(whole: Sample, tokens: Whole, one: Written, fit: _Fit) -> Iterator[Sample]:
    """The sequences that a text becomes: itself, what is left of it, or parts that begin as it does."""
    if len(whole.ids) <= fit.length:
        yield whole
        return
    head, tail = _special(whole, tokens, one, fit)
    body = slice(head, len(whole.ids) - tail)
    num_body = body.stop - head
    room = fit.length - head - tail
    if fit.overlap == CUT:
        kept = np.arange(head, head + room) if fit.side == "right" else np.arange(body.stop - room, body.stop)
        yield _picked(whole, kept, head, tail)
        return
    new = room - fit.overlap
    if new < 1:
        raise ConfigError(
            f"an overlap of {fit.overlap} tokens leaves nothing new in sequences of {fit.length}; lower it, or raise --seq-len"
        )
    for start in range(0, num_body - fit.overlap, new):
        stop = min(start + room, num_body)
        part = _picked(whole, np.arange(head + start, head + stop), head, tail if stop == num_body else 0)
        if start:
            part.labels[: head + fit.overlap] = IGNORED
        yield part


def _special(whole: Sample, tokens: Whole, one: Written, fit: _Fit) -> tuple[int, int]:
    """Tokens at either end that every part of a text has."""
    special = tokens.is_special
    head = int(np.argmin(special)) if not special.all() else 0
    if not one.is_plain and whole.ids[0] == fit.start:
        head = 1
    has_end = len(whole.ids) > len(special)
    return head, 0 if has_end or special.all() else int(np.argmin(special[::-1]))


def _picked(whole: Sample, kept: NDArray[np.int64], head: int, tail: int) -> Sample:
    """These tokens of a text, between its first ``head`` and its last ``tail``."""
    size = len(whole.ids)
    places = np.concatenate([np.arange(head), kept, np.arange(size - tail, size)])
    return Sample(*(column[places] for column in whole))
