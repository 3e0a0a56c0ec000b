import numpy as np
import pytest

from fleetune.device_runtime.data.text import encode_texts, encode_words, first_tokens, load_tokenizer
from fleetune.device_runtime.errors import ArtifactError


@pytest.fixture
def engine(text_folder):
    return load_tokenizer(text_folder / "tokenizer.json", max_length=16)


def rows(encoded, column):
    return [part.tolist() for part in np.split(column, np.cumsum(encoded.lengths)[:-1])]


def test_ids_are_berts_and_rows_are_not_padded(engine):
    encoded = encode_texts(engine, ["hello world", "Hi"], ["", ""])
    assert rows(encoded, encoded.ids) == [[101, 7592, 2088, 102], [101, 7632, 102]]
    assert not encoded.types.any()


def test_a_pair_has_types_and_a_lone_text_beside_it_has_not(engine):
    encoded = encode_texts(engine, ["hello", "hello"], ["world", ""])
    assert rows(encoded, encoded.ids) == [[101, 7592, 102, 2088, 102], [101, 7592, 102]]
    assert rows(encoded, encoded.types) == [[0, 0, 0, 1, 1], [0, 0, 0]]


def test_long_texts_are_cut_with_their_end_mark(engine):
    encoded = encode_texts(engine, ["hello " * 100], [""])
    assert encoded.lengths.tolist() == [16]
    assert encoded.ids[-1] == 102


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_row_had_before_it_was_cut_is_counted(text_folder, side):
    engine = load_tokenizer(text_folder / "tokenizer.json", max_length=16, side=side)
    texts, pairs = ["hello " * 100, "hi", "hi " * 9, "hi " * 30], ["", "", "hello " * 20, "hello " * 40]
    encoded = encode_texts(engine, texts, pairs)
    assert encoded.lengths.tolist() == [16, 3, 16, 16]
    assert encoded.uncut.tolist() == [102, 3, 32, 73]
    words = encode_words(engine, [["hello"] * 50, ["hi"]])
    assert (words.lengths.tolist(), words.uncut.tolist()) == ([16, 3], [52, 3])


def test_more_texts_than_a_piece_stay_in_order(engine):
    words = ["hello", "world", "hi"]
    encoded = encode_texts(engine, [words[i % 3] for i in range(2500)], [""] * 2500)
    assert encoded.ids.reshape(2500, 3)[:, 1].tolist() == [(7592, 2088, 7632)[i % 3] for i in range(2500)]


def test_only_the_first_token_of_a_word_is_marked(engine):
    encoded = encode_words(engine, [["unbelievably", "hello"], ["hello", "hello"]])
    first = rows(encoded, first_tokens(encoded))
    words = rows(encoded, encoded.words)
    assert words[1] == [-1, 0, 1, -1]
    assert first[1] == [False, True, True, False]
    assert len(words[0]) > 4  # the long word falls into several tokens
    assert [w for w, is_first in zip(words[0], first[0], strict=True) if is_first] == [0, 1]


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("tokenizer.json", "absent.json"):
        with pytest.raises(ArtifactError, match=f"{name}: cannot be read as a tokenizer"):
            load_tokenizer(tmp_path / name, max_length=8)
