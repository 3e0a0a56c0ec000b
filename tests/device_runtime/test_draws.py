import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.device_runtime import draws
from fleetune.device_runtime.draws import (
    SEED_MAX,
    STREAMS,
    Draws,
    Key,
    integers,
    permutation,
    philox,
    uniform,
    uniforms,
    weighted,
    words,
)
from fleetune.device_runtime.errors import ConfigError, UnknownName

KEY = Key(7, "plans", 3)
KNOWN = [  # Random123, kat_vectors, philox4x32 of 10 rounds: counter, key, answer
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def parsed(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer):
    counters = np.array([parsed(counter), [1, 2, 3, 4]], np.uint32)
    assert philox(counters, tuple(parsed(key)))[0].tolist() == parsed(answer)


def test_a_word_is_where_the_docstring_says():
    seed = 5 * 2**32 + 9
    drawn = words(Key(seed, "devices", 11, 13), 6)
    for block in (0, 1):
        counter = np.array([[block, 11, 13, STREAMS["devices"]]], np.uint32)
        want = philox(counter, (9, 5))[0].tolist()
        assert drawn[4 * block : 4 * block + 4].tolist() == want[: 4 - 2 * block]


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("count", [1, 4])
def test_few_words_are_the_same_whatever_integers_the_key_is_of(kind, count):
    key = Key(kind(2**31 - 9), "devices", kind(2**31 - 7), kind(2**31 - 5))
    assert (
        words(key, count).tolist()
        == words(Key(*(int(k) if k != "devices" else k for k in key)), count).tolist()
    )


def test_integers_and_uniforms_by_hand():
    """Of two words a and b: the upper 27 bits of a, then the upper 26 of b, as Python's random() does."""
    a, b = (int(word) for word in words(KEY, 2))
    assert integers(KEY, 1).tolist() == [(a >> 5) * 2**26 + (b >> 6)]
    assert uniforms(KEY, 1)[0] == ((a >> 5) * 67108864 + (b >> 6)) / 9007199254740992


@given(
    st.integers(0, SEED_MAX), st.sampled_from(sorted(STREAMS)), st.integers(0, 2**32 - 1), st.integers(0, 40)
)
def test_more_draws_begin_with_fewer_and_all_are_in_range(seed, stream, number, count):
    key = Key(seed, stream, number)
    assert uniforms(key, count).tolist() == uniforms(key, count + 7)[:count].tolist()
    assert ((uniforms(key, count) >= 0) & (uniforms(key, count) < 1)).all()
    assert sorted(permutation(key, count).tolist()) == list(range(count))


@pytest.mark.parametrize("seed", [0, 7, 2**48 - 1])
def test_one_uniform_is_the_first_of_many(seed):
    for number in range(20):
        key = Key(seed, "jitter", number)
        assert uniform(key) == uniforms(key, 3)[0]


def test_keys_that_differ_anywhere_draw_differently():
    keys = [
        KEY,
        KEY._replace(seed=8),
        KEY._replace(seed=7 + 2**32),
        KEY._replace(number=4),
        KEY._replace(part=1),
    ]
    keys += [KEY._replace(stream=name) for name in STREAMS if name != "plans"]
    assert len({tuple(words(key, 4).tolist()) for key in keys}) == len(keys)
    assert len(set(STREAMS.values())) == len(STREAMS)


def test_uniforms_are_uniform():
    """Mean within 5 standard errors, each tenth within 5 deviations of a binomial."""
    drawn = uniforms(KEY, 100_000)
    assert drawn.mean() == pytest.approx(0.5, abs=5 * np.sqrt(1 / 12 / len(drawn)))
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(len(drawn) * 0.09)


def test_permutations_are_fair():
    firsts = np.bincount([permutation(Key(1, "batches", i), 6)[0] for i in range(6000)], minlength=6)
    assert np.abs(firsts - 1000).max() < 5 * np.sqrt(6000 / 6 * 5 / 6)


@pytest.mark.parametrize("number", range(20))
def test_weighted_by_hand(number):
    """Weights 1, 0, 2, 1 and the draws u: running sums, then those without what was taken."""
    key = Key(7, "plans", number)
    taken, left = [], [1.0, 0.0, 2.0, 1.0]
    for x in uniforms(key, 3):
        place = next(i for i in range(4) if sum(left[: i + 1]) > x * sum(left))
        taken.append(place)
        left[place] = 0.0
    assert weighted(key, np.array([1.0, 0.0, 2.0, 1.0]), count=3).tolist() == taken
    assert sorted(taken) == [0, 2, 3]


def test_a_place_of_no_weight_is_never_drawn(monkeypatch):
    monkeypatch.setattr(draws, "uniforms", lambda key, count: np.zeros(count))
    assert weighted(KEY, np.array([0.0, 1.0, 0.0, 1.0]), count=2).tolist() == [1, 3]
    monkeypatch.setattr(draws, "uniforms", lambda key, count: np.full(count, 1 - 2.0**-53))
    assert weighted(KEY, np.array([1.0, 1 / 3, 0.0]), count=2).tolist() == [1, 0]


def test_weighted_draws_by_weight():
    firsts = [weighted(Key(0, "plans", i), np.array([5.0, 3.0, 2.0]), count=1)[0] for i in range(5000)]
    shares = np.bincount(firsts, minlength=3) / 5000
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=5 * 0.5 / np.sqrt(5000))


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, np.nan], [np.inf, 1.0]])
def test_weights_that_cannot_be_drawn_from_are_refused(weights):
    with pytest.raises(ValueError, match=r"2 of weights \[.*above 0, all finite, none negative"):
        weighted(KEY, np.array(weights), count=2)


def test_each_call_draws_anew_and_equal_calls_draw_alike():
    def drawn():
        step = Draws(7, "plans", 3)
        return [step.uniforms(2).tolist(), step.uniforms(2).tolist(), step.permutation(9).tolist()]

    assert drawn() == drawn()
    assert drawn()[0] == uniforms(KEY, 2).tolist()
    assert drawn()[1] == uniforms(KEY._replace(part=1), 2).tolist()
    assert drawn()[2] == permutation(KEY._replace(part=2), 9).tolist()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (KEY._replace(seed=-1), r"seed -1: from 0 to 2\*\*53 - 1"),
        (KEY._replace(seed=2**53), "seed 9007199254740992: from 0"),
        (KEY._replace(number=2**32), "draws for plans: number 4294967296; from 0"),
        (KEY._replace(part=-1), "draws for plans: part -1; from 0"),
    ],
)
def test_a_key_out_of_range_is_refused(key, said):
    with pytest.raises(ConfigError, match=said):
        words(key, 1)
    with pytest.raises(UnknownName, match=f"no stream of draws 'plan'; have: {', '.join(sorted(STREAMS))}"):
        words(KEY._replace(stream="plan"), 1)
