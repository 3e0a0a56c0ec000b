"""Texts to token ids with the artifact's tokenizer; the only file that imports the ``tokenizers`` library."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError, lacking

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_PIECE = 1024
"""Texts tokenised at a time: encodings weigh far more than their ids."""
NO_WORD = -1
_CONTEXT = 16
"""Tokens that are decoded with the next one: how it is spelled may depend on those before."""
_HALF = "\N{REPLACEMENT CHARACTER}"


class Engine(NamedTuple):
    """A tokenizer, and where it cuts texts that are too long."""

    tokenizer: "Tokenizer"
    max_length: int
    """In tokens, special ones included."""
    side: Literal["left", "right"]

    def cut(self) -> None:
        """Have what it encodes cut from now on."""
        self.tokenizer.enable_truncation(self.max_length, direction=self.side)

    def token_of(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return self.tokenizer.id_to_token(token_id) or ""

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None if there is none."""
        found: int | None = self.tokenizer.token_to_id(token)
        return found


class Writing:
    """Text that grows by one token at a time; what is half a character is held back until it is whole."""

    def __init__(self, tokenizer: "Tokenizer", ids: Sequence[int]) -> None:
        """``ids`` are the tokens before, whose text is not told again."""
        self._tokenizer, self._ids = tokenizer, list(ids[-_CONTEXT:])
        self._told = self._text()

    def add(self, token_id: int) -> str:
        """Take a token and return what it adds to the text; special tokens add nothing."""
        self._ids.append(token_id)
        text = self._text()
        if text.endswith(_HALF):
            return ""
        added = text[len(self._told) :]
        if len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            text = self._text()
        self._told = text
        return added

    def rest(self) -> str:
        """What is held back still."""
        return self._text()[len(self._told) :]

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids))


class Encoded(NamedTuple):
    """Ragged rows, one after the other.

    ``ids`` int32, ``types`` uint8 (which text of a pair) and ``words`` int32 (index of the word, -1 for special tokens)
    have one entry a token; ``lengths`` int64 (num_texts,) counts each row's tokens, ``uncut`` those it had before it was cut.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    words: NDArray[np.int32]
    lengths: NDArray[np.int64]
    uncut: NDArray[np.int64]


def load_tokenizer(path: Path, *, max_length: int, side: Literal["left", "right"] = "right") -> Engine:
    """Read a tokenizer file, to cut at ``max_length`` tokens (special ones included) and never to pad.

    ``side`` is the end at which a text loses tokens; the longer text of a pair loses first, as in transformers.

    Raises:
        ConfigError: ``max_length`` leaves no room for text, or the ``tokenizers`` library is not installed.
        ArtifactError: the file is missing or is no tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise lacking("text", "tokenizers", "device") from exc
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises nothing narrower
        raise ArtifactError(f"{path}: cannot be read as a tokenizer: {exc}") from exc
    num_special = tokenizer.num_special_tokens_to_add(True)
    if max_length <= num_special:
        raise ConfigError(
            f"sequence length {max_length} leaves no room for text beside {num_special} special tokens"
        )
    tokenizer.no_padding()
    engine = Engine(tokenizer, max_length, side)
    engine.cut()
    return engine


def encode_texts(engine: Engine, texts: Sequence[str], pairs: Sequence[str]) -> Encoded:
    """Token ids of each text, or of each (text, pair) where the pair is not empty."""
    inputs = [(text, pair) if pair else text for text, pair in zip(texts, pairs, strict=True)]
    return _encode(engine, inputs, pretokenized=False)


def encode_prompt(engine: Engine, text: str, ends: Collection[int] = ()) -> list[int]:
    """Token ids of a text that is to go on: whole, and without the ``ends`` that the tokenizer puts behind a text.

    Raises:
        DataError: the tokenizer cannot take it.
    """
    (whole,) = encode_whole(engine, [(text, "")], is_plain=True)
    size = len(whole.ids)
    while size and whole.is_special[size - 1] and whole.ids[size - 1] in ends:
        size -= 1
    ids: list[int] = whole.ids[:size].tolist()
    return ids


def encode_words(engine: Engine, sentences: Sequence[Sequence[str]]) -> Encoded:
    """Token ids of sentences that are cut into words already; ``words`` says which word a token is of."""
    return _encode(engine, [list(words) for words in sentences], pretokenized=True)


class Whole(NamedTuple):
    """The tokens of one text, uncut.

    ``ids`` int32, ``types`` uint8, ``starts`` and ``ends`` int64 (in characters of the text; 0 of special ones) and
    ``is_special`` bool (added by the tokenizer, not in the text) have one entry a token.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    is_special: NDArray[np.bool_]


def encode_whole(engine: Engine, texts: Sequence[tuple[str, str]], *, is_plain: bool) -> Iterator[Whole]:
    """Yield the tokens of each text, or (text, pair) where the pair is not empty; ``is_plain`` adds the special tokens."""
    engine.tokenizer.no_truncation()
    try:
        for start in range(0, len(texts), _PIECE):
            inputs = [(text, pair) if pair else text for text, pair in texts[start : start + _PIECE]]
            try:
                encodings = engine.tokenizer.encode_batch(inputs, add_special_tokens=is_plain)
            except Exception as exc:  # the library raises nothing narrower
                raise DataError(f"text that the tokenizer cannot take: {exc}") from exc
            yield from map(_whole, encodings)
    finally:
        engine.cut()


def _whole(encoding: "Encoding") -> Whole:
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return Whole(
        np.array(encoding.ids, np.int32),
        np.array(encoding.type_ids, np.uint8),
        offsets[:, 0],
        offsets[:, 1],
        np.array(encoding.special_tokens_mask, bool),
    )


def first_tokens(encoded: Encoded) -> NDArray[np.bool_]:
    """Whether each token is the first of its word."""
    starts = np.zeros(len(encoded.ids), bool)
    row_starts = (np.cumsum(encoded.lengths) - encoded.lengths)[encoded.lengths > 0]
    starts[row_starts] = True
    changed = np.diff(encoded.words, prepend=NO_WORD) != 0
    first: NDArray[np.bool_] = (encoded.words != NO_WORD) & (changed | starts)
    return first


def _encode(engine: Engine, inputs: Sequence[Any], *, pretokenized: bool) -> Encoded:
    pieces = []
    for start in range(0, len(inputs), _PIECE):
        some = list(inputs[start : start + _PIECE])
        try:
            encodings = engine.tokenizer.encode_batch(some, is_pretokenized=pretokenized)
            pieces.append(_flatten(encodings, _uncut(engine, some, encodings)))
        except Exception as exc:  # the library raises nothing narrower
            raise DataError(f"text that the tokenizer cannot take: {exc}") from exc
    return Encoded(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _uncut(engine: Engine, inputs: Sequence[Any], encodings: "Sequence[Encoding]") -> NDArray[np.int64]:
    """Tokens of each row before it was cut; what is cut off one text comes in pieces with special tokens of their own."""
    num_special = engine.tokenizer.num_special_tokens_to_add(False)
    pieces = [encoding.overflowing for encoding in encodings]
    lengths = [
        len(encoding) + sum(len(piece) - num_special for piece in rest)
        for encoding, rest in zip(encodings, pieces, strict=True)
    ]
    pairs = [i for i, rest in enumerate(pieces) if rest and isinstance(inputs[i], tuple)]
    found = np.array(lengths, np.int64)
    if pairs:  # the pieces of one text come with each of the other's
        engine.tokenizer.no_truncation()
        found[pairs] = [len(e) for e in engine.tokenizer.encode_batch([inputs[i] for i in pairs])]
        engine.cut()
    return found


def _flatten(encodings: "Sequence[Encoding]", uncut: NDArray[np.int64]) -> Encoded:
    words = [NO_WORD if word is None else word for e in encodings for word in e.word_ids]
    return Encoded(
        np.array([i for e in encodings for i in e.ids], np.int32),
        np.array([t for e in encodings for t in e.type_ids], np.uint8),
        np.array(words, np.int32),
        np.array([len(e) for e in encodings], np.int64),
        uncut,
    )
