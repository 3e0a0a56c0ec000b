"""What model and tokenizer both say, decided once: one function a thing, which returns what holds and tells what differs.

Devices follow the manifest alone, so whatever is decided here goes into it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer as Engine

from fleetune.device_runtime.errors import ExportError, one_line, some
from fleetune.toolkit.hearing import Tell

_NO_LIMIT = 1 << 20
_SHOWN = 5
_SAMPLES = ("Turn the KITCHEN light's dimmer on, please.", "  two  spaces,\ta tab\n", "Naïve ÉCLAIR 東京 123")
"""Case, accents, space and punctuation: what a normaliser changes."""
_WORDS = ("lamp", "lamp", "off")


def padding(config: Any, tokenizer: Any, *, tell: Tell) -> int | None:
    """The id that fills rows; None where nobody names one that the embedding has a row for.

    The model's own decides, since a decoder's classifier finds the last token by it, and RoBERTa its positions; then the
    tokenizer's, then an end of text.

    Raises:
        ExportError: the model's own is no id, and there is no other.
    """
    text = config.get_text_config()
    rows, own = getattr(text, "vocab_size", None) or 0, getattr(text, "pad_token_id", None)
    named = {"the model's": own, "the tokenizer's": getattr(tokenizer, "pad_token_id", None)}
    ends = {
        "the tokenizer's end of text": getattr(tokenizer, "eos_token_id", None),
        "the model's end of text": _first(getattr(text, "eos_token_id", None)),
    }
    usable = {of: i for of, i in (named | ends).items() if i is not None and 0 <= i < rows}
    if not usable:
        if own is not None and rows:
            raise ExportError(f"pad_token_id is {own}, of {rows} tokens; set it to a token in config.json")
        return None
    of = next(iter(usable))
    chosen = int(usable[of])
    others = [f"{other} is {i}" for other, i in named.items() if i not in (None, chosen)]
    if others or of in ends:
        tell(f"padding: token {chosen}, {of}" + "".join(f"; {other}" for other in others))
    return chosen


def padding_settings(config: Any, tokenizer: Any, *, tell: Tell) -> dict[str, Any]:
    """What ``from_pretrained`` is given so that the model pads by :func:`padding`; nothing where it does so by itself."""
    chosen = padding(config, tokenizer, tell=tell)
    return {} if chosen == getattr(config, "pad_token_id", chosen) else {"pad_token_id": chosen}


def longest(
    positions: int | None, config: Any, tokenizer: Any, *, asked: int | None = None, tell: Tell
) -> int:
    """The most tokens of a text, by model, tokenizer and what is ``asked``.

    The model's are its ``positions`` or, where it keeps none (rotary), what its configuration claims.

    Raises:
        ExportError: no room for text beside the special tokens.
    """
    claimed = positions or getattr(config.get_text_config(), "max_position_embeddings", None)
    allowed = getattr(tokenizer, "model_max_length", None)
    limit = int(min([n for n in (claimed, allowed) if n and n > 0], default=_NO_LIMIT))
    limit = min(limit, _NO_LIMIT)
    if positions and allowed and positions < allowed < _NO_LIMIT:
        tell(f"length: the tokenizer allows {allowed} tokens, the model has positions for {positions}")
    if asked and asked > limit:
        tell(f"length: {asked} tokens are asked for, {limit} is the most that model and tokenizer take")
    limit = min(asked or limit, limit)
    special = tokenizer.num_special_tokens_to_add(pair=True) if tokenizer is not None else 0
    if limit <= special:
        raise ExportError(f"{limit} tokens at most: no room for text beside {special} special tokens")
    return limit


def check_vocabulary(tokenizer: Any, rows: int, *, tell: Tell) -> None:
    """Tell which tokens the embedding of ``rows`` rows lacks.

    Raises:
        ExportError: every text would hold one of them.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not beyond:
        return
    tokens = [repr(one_line(token, length_max=40)) for token in sorted(beyond, key=beyond.__getitem__)]
    what = f"the embedding has {rows} rows, none for {len(tokens)} of the tokenizer's tokens: {some(tokens)}"
    if any(i >= rows for i in tokenizer("")["input_ids"]):
        raise ExportError(
            f"{what}; every text gets one: take the model's own tokenizer, or resize_token_embeddings"
        )
    tell(f"vocabulary: {what}; data that hold one are refused (resize_token_embeddings makes rows)")


def tokenizer_file(tokenizer: Any, *, into_words: bool, tell: Tell) -> bytes:
    """The tokenizer as devices read it, ``tokenizer.json``; with ``into_words`` it takes sentences that are cut into words.

    Raises:
        ExportError: it makes other tokens than transformers does, or of words other tokens than of a sentence.
    """
    text = tokenizer.backend_tokenizer.to_str()
    _check_file(tokenizer, _engine(text))
    if into_words and not _words_are_a_sentence(_engine(text)):
        text = _with_space_before_words(text)
        tell("words: each gets the space before it that the tokenizer knows it by (add_prefix_space)")
    return str(text).encode()


def end_of_text(tokenizer: Any, *, tell: Tell) -> None:
    """Tell that no token ends a text: a language model learns from it when to stop, and devices add it."""
    if tokenizer.eos_token is None:
        tell("end of text: the tokenizer names none, so the model is not taught where texts and answers end")


def _first(ids: Any) -> Any:
    return next(iter(ids), None) if isinstance(ids, (list, tuple)) else ids


def _engine(text: str) -> Engine:
    engine = Engine.from_str(text)
    engine.no_truncation()
    engine.no_padding()
    return engine


def _check_file(tokenizer: Any, engine: Engine) -> None:
    special = [f"lamp {token} off" for token in tokenizer.all_special_tokens[:1]]
    for sample in (*_SAMPLES, *special):
        wanted, got = tokenizer(sample, verbose=False)["input_ids"], engine.encode(sample).ids
        if wanted != got:
            raise ExportError(
                f"of {sample!r} transformers makes the tokens {wanted[:_SHOWN]}…, the tokenizer.json that devices read "
                f"{got[:_SHOWN]}…: "
                f"{type(tokenizer).__name__} does something of its own (split_special_tokens?)"
            )


def _words_are_a_sentence(engine: Engine) -> bool:
    """Whether words one by one become the tokens that they have in a sentence, the first word too, but for the sentence's."""
    sentence = engine.encode(" ".join(_WORDS), add_special_tokens=False)
    words = engine.encode(list(_WORDS), is_pretokenized=True, add_special_tokens=False)
    later = [i for i, (_, end) in zip(sentence.ids, sentence.offsets, strict=True) if end > len(_WORDS[0])]
    by_word = [[i for i, of in zip(words.ids, words.word_ids, strict=True) if of == n] for n in range(3)]
    return by_word[1] + by_word[2] == later and by_word[0] == by_word[1]


def _with_space_before_words(text: str) -> str:
    """Byte-level BPE that puts a space before each word, where the file says so or, before a splitting pattern, by itself."""
    for changed in _changes(json.loads(text)):
        made = json.dumps(changed, ensure_ascii=False)
        if _words_are_a_sentence(_engine(made)):
            return made
    raise ExportError(
        "its tokenizer makes other tokens of words than of a sentence, and add_prefix_space does not mend it: "
        "token classification reads words"
    )


def _changes(tokenizer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    before = tokenizer.get("pre_tokenizer") or {}
    if before.get("type") == "ByteLevel":
        yield {**tokenizer, "pre_tokenizer": before | {"add_prefix_space": True}}
    normalizer = tokenizer.get("normalizer")
    space = {"type": "Prepend", "prepend": " "}
    both = {"type": "Sequence", "normalizers": [normalizer, space]} if normalizer else space
    yield {**tokenizer, "normalizer": both}
