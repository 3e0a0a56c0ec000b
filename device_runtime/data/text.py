"""Texts to token ids with the artifact's tokenizer; the only file that imports the ``tokenizers`` library."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Engine

_PIECE = 1024
"""Texts tokenised at a time: encodings weigh far more than their ids."""
NO_WORD = -1


class Encoded(NamedTuple):
    """Ragged rows, one after the other.

    ``ids`` int32, ``types`` uint8 (which text of a pair) and ``words`` int32 (index of the word, -1 for special tokens)
    have one entry a token; ``lengths`` int64 (num_texts,) counts each row's tokens.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    words: NDArray[np.int32]
    lengths: NDArray[np.int64]


def load_tokenizer(path: Path, *, max_length: int) -> "Engine":
    """Read a tokenizer file, to cut at ``max_length`` tokens (special ones included) and never to pad.

    Raises:
        ConfigError: ``max_length`` leaves no room for text, or the ``tokenizers`` library is not installed.
        ArtifactError: the file is missing or is no tokenizer.
    """
    try:
        from tokenizers import Tokenizer as Engine
    except ImportError as exc:
        raise ConfigError("text needs the `tokenizers` library: pip install 'fleetune[device]'") from exc
    try:
        engine = Engine.from_file(str(path))
    except Exception as exc:  # the library raises nothing narrower
        raise ArtifactError(f"{path}: cannot be read as a tokenizer: {exc}") from exc
    num_special = engine.num_special_tokens_to_add(True)
    if max_length <= num_special:
        raise ConfigError(
            f"sequence length {max_length} leaves no room for text beside {num_special} special tokens"
        )
    engine.no_padding()
    engine.enable_truncation(max_length)
    return engine


def encode_texts(engine: "Engine", texts: Sequence[str], pairs: Sequence[str]) -> Encoded:
    """Token ids of each text, or of each (text, pair) where the pair is not empty."""
    inputs = [(text, pair) if pair else text for text, pair in zip(texts, pairs, strict=True)]
    return _encode(engine, inputs, pretokenized=False)


def encode_words(engine: "Engine", sentences: Sequence[Sequence[str]]) -> Encoded:
    """Token ids of sentences that are cut into words already; ``words`` says which word a token is of."""
    return _encode(engine, [list(words) for words in sentences], pretokenized=True)


def first_tokens(encoded: Encoded) -> NDArray[np.bool_]:
    """Whether each token is the first of its word."""
    starts = np.zeros(len(encoded.ids), bool)
    row_starts = (np.cumsum(encoded.lengths) - encoded.lengths)[encoded.lengths > 0]
    starts[row_starts] = True
    changed = np.diff(encoded.words, prepend=NO_WORD) != 0
    first: NDArray[np.bool_] = (encoded.words != NO_WORD) & (changed | starts)
    return first


def _encode(engine: "Engine", inputs: Sequence[object], *, pretokenized: bool) -> Encoded:
    pieces = []
    for start in range(0, len(inputs), _PIECE):
        batch = engine.encode_batch(list(inputs[start : start + _PIECE]), is_pretokenized=pretokenized)
        pieces.append(_flatten(batch))
    return Encoded(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _flatten(encodings: "Sequence[Encoding]") -> Encoded:
    words = [NO_WORD if word is None else word for e in encodings for word in e.word_ids]
    return Encoded(
        np.array([i for e in encodings for i in e.ids], np.int32),
        np.array([t for e in encodings for t in e.type_ids], np.uint8),
        np.array(words, np.int32),
        np.array([len(e) for e in encodings], np.int64),
    )
