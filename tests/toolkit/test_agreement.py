"""Where model and tokenizer say different things of one thing, one of them holds, by name, and the rest is told."""

from typing import Any

import pytest
import transformers
from tiny_tokenizers import NUM_TOKENS, WORDS, byte_tokenizer, word_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.agreement import check_vocabulary, end_of_text, longest, padding, tokenizer_file


def llama(**settings: Any) -> Any:
    return transformers.LlamaConfig(
        **{"vocab_size": 320, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **settings}
    )


@pytest.mark.parametrize(
    ("model", "tokenizer", "chosen", "told"),
    [
        ({"pad_token_id": 0}, {"pad_token": "[PAD]"}, 0, None),
        ({"pad_token_id": 4}, {"pad_token": "[PAD]"}, 4, "token 4, the model's; the tokenizer's is 0"),
        ({}, {"pad_token": "[SEP]"}, 3, None),
        ({"pad_token_id": 5, "eos_token_id": 6}, {"eos_token": "[SEP]"}, 5, "the tokenizer's is 0"),
        ({}, {"pad_token": None, "eos_token": "[MASK]"}, 4, "token 4, the tokenizer's end of text"),
        ({"eos_token_id": [7, 8]}, {"pad_token": None}, 7, "token 7, the model's end of text"),
        ({"pad_token_id": -1}, {"pad_token": "[PAD]"}, 0, "token 0, the tokenizer's; the model's is -1"),
        ({"vocab_size": 3}, {"pad_token": "[MASK]", "eos_token": "[CLS]"}, 2, "the tokenizer's is 4"),
        ({}, {"pad_token": None}, None, None),
    ],
)
def test_padding(
    model: dict[str, Any], tokenizer: dict[str, Any], chosen: int | None, told: str | None
) -> None:
    notes: list[str] = []
    assert padding(llama(**model), word_tokenizer(**tokenizer), tell=notes.append) == chosen
    assert [told in note for note in notes] == [True] if told else notes == []


def test_padding_that_is_no_token_is_refused_where_there_is_no_other() -> None:
    with pytest.raises(ExportError, match="pad_token_id is 320, of 320 tokens"):
        padding(llama(pad_token_id=320), None, tell=print)


@pytest.mark.parametrize(
    ("positions", "claimed", "allowed", "asked", "chosen", "told"),
    [
        (12, 14, 14, None, 12, "the tokenizer allows 14 tokens, the model has positions for 12"),
        (12, 14, 10, None, 10, None),
        (12, 14, int(1e30), None, 12, None),
        (None, 14, int(1e30), None, 14, None),
        (None, None, int(1e30), None, 1 << 20, None),
        (12, 12, 12, 8, 8, None),
        (12, 12, 12, 13, 12, "13 tokens are asked for, 12 is the most"),
    ],
)
def test_length(
    positions: int | None, claimed: int | None, allowed: int, asked: int | None, chosen: int, told: str | None
) -> None:
    notes: list[str] = []
    config = llama(max_position_embeddings=claimed) if claimed else transformers.BloomConfig()
    tokenizer = word_tokenizer(model_max_length=allowed)
    assert longest(positions, config, tokenizer, asked=asked, tell=notes.append) == chosen
    assert [told in note for note in notes] == [True] if told else notes == []


def test_a_tokenizer_without_room_for_text_is_refused() -> None:
    with pytest.raises(ExportError, match="3 tokens at most: no room for text beside 3 special"):
        longest(12, llama(), word_tokenizer(model_max_length=3), tell=print)


def test_tokens_without_a_row_are_counted_and_named() -> None:
    tokenizer, notes = word_tokenizer(), []
    tokenizer.add_tokens(["<device>", "<time>"])
    check_vocabulary(tokenizer, NUM_TOKENS + 2, tell=notes.append)
    assert notes == []
    check_vocabulary(tokenizer, NUM_TOKENS, tell=notes.append)
    assert len(notes) == 1
    assert f"the embedding has {NUM_TOKENS} rows, none for 2 of the tokenizer's tokens" in notes[0]
    assert "'<device>', '<time>'" in notes[0]


def test_a_tokenizer_whose_every_text_has_a_token_without_a_row_is_refused() -> None:
    with pytest.raises(ExportError, match=r"none for 13 of the tokenizer's tokens: .*every text gets one"):
        check_vocabulary(word_tokenizer(), 2, tell=print)


def pieces_of(file: bytes, words: list[str]) -> list[str]:
    return list(
        Tokenizer.from_str(file.decode()).encode(words, is_pretokenized=True, add_special_tokens=False).tokens
    )


def test_words_get_the_space_that_a_byte_level_bpe_knows_them_by() -> None:
    tokenizer, notes = byte_tokenizer(), []
    file = tokenizer_file(tokenizer, into_words=True, tell=notes.append)
    assert pieces_of(file, ["lamp", "off"]) == ["Ġlamp", "Ġoff"]
    assert pieces_of(tokenizer.backend_tokenizer.to_str().encode(), ["lamp"]) != ["Ġlamp"]
    assert [note.startswith("words: ") for note in notes] == [True]


def test_the_space_comes_before_a_pattern_splits_words() -> None:
    pattern = pre_tokenizers.Split(Regex(r"'\w+| ?\w+|[^\s\w]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = byte_tokenizer(pre_tokenizers.Sequence([pattern, byte_level]))
    file = tokenizer_file(tokenizer, into_words=True, tell=lambda _: None)
    assert pieces_of(file, ["lamp", "off"]) == ["Ġlamp", "Ġoff"]
    assert pieces_of(file, ["lamp's"])[:2] == ["Ġlamp", "'"]


@pytest.mark.parametrize("into_words", [False, True])
def test_a_tokenizer_of_whole_words_stays_as_it_is(into_words: bool) -> None:
    tokenizer, notes = word_tokenizer(), []
    before = tokenizer.backend_tokenizer.to_str().encode()
    assert tokenizer_file(tokenizer, into_words=into_words, tell=notes.append) == before
    assert notes == []


def test_texts_keep_a_byte_level_bpe_as_it_is() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer.backend_tokenizer.to_str().encode()
    assert tokenizer_file(tokenizer, into_words=False, tell=print) == before


def test_a_tokenizer_of_other_tokens_for_words_is_refused_where_a_space_does_not_mend_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("!")
    with pytest.raises(ExportError, match="token classification reads words"):
        tokenizer_file(tokenizer, into_words=True, tell=print)


def test_a_python_side_that_does_something_of_its_own_is_refused() -> None:
    split = word_tokenizer(split_special_tokens=True)
    with pytest.raises(ExportError, match=r"transformers makes the tokens .*split_special_tokens"):
        tokenizer_file(split, into_words=False, tell=print)


class Lowering(transformers.PreTrainedTokenizerFast):
    def _encode_plus(self, text: Any, *args: Any, **settings: Any) -> Any:
        return super()._encode_plus(text.lower(), *args, **settings)


def test_case_that_only_python_changes_is_refused() -> None:
    lowering = Lowering(tokenizer_object=byte_tokenizer().backend_tokenizer)
    with pytest.raises(ExportError, match=r'of "Turn the KITCHEN .* Lowering does something of its own'):
        tokenizer_file(lowering, into_words=False, tell=print)


def test_no_end_of_text_is_told() -> None:
    notes: list[str] = []
    end_of_text(byte_tokenizer(), tell=notes.append)
    end_of_text(word_tokenizer(eos_token="[SEP]"), tell=notes.append)
    end_of_text(word_tokenizer(), tell=notes.append)
    assert [note.startswith("end of text: the tokenizer names none") for note in notes] == [True]
    assert "lamp" in WORDS
