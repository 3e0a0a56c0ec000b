from collections import Counter

import numpy as np
import pytest

from fleetune.device_runtime.draws import Key, uniforms
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.sampling import Sampling, next_token
from fleetune.device_runtime.options import check

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


def drawn(count=2000, **settings):
    sampling = Sampling(temperature=settings.pop("temperature", 1.0), **settings)
    return Counter(next_token(LOGITS, sampling, number) for number in range(count))


def test_without_temperature_it_is_the_likeliest_and_of_equal_ones_the_first():
    assert next_token(LOGITS, Sampling(), 0) == 1
    assert next_token(np.array([0.0, 2.0, 2.0]), Sampling(), 5) == 1


def test_a_temperature_draws_by_probability():
    shares = np.array([drawn()[i] for i in range(5)]) / 2000
    np.testing.assert_allclose(shares, np.exp(LOGITS), atol=0.03)
    cold = drawn(temperature=0.5)
    np.testing.assert_allclose(cold[1] / 2000, 0.16 / (0.01 + 0.16 + 0.0025 + 0.0625 + 0.04), atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "left"), [(0.3, {1}), (0.4, {1}), (0.5, {1, 3}), (0.7, {1, 3, 4}), (0.94, {0, 1, 3, 4})]
)
def test_top_p_leaves_the_fewest_likeliest_that_come_to_it(top_p, left):
    assert set(drawn(top_p=top_p)) == left


def test_a_draw_is_that_of_the_stream_tokens_at_its_place():
    """Likeliest first: 1, 3, 4, 0, 2 end at 0.4, 0.65, 0.85, 0.95 and 1."""
    ends, order = np.array([0.4, 0.65, 0.85, 0.95]), [1, 3, 4, 0, 2]
    for number in range(20):
        (u,) = uniforms(Key(7, "tokens", number), 1)
        wanted = order[int(np.searchsorted(ends, u, side="right"))]
        assert next_token(LOGITS, Sampling(temperature=1.0, seed=7), number) == wanted


def test_a_seed_repeats_and_another_differs():
    def text(seed):
        return [next_token(LOGITS, Sampling(temperature=2.0, seed=seed), n) for n in range(30)]

    assert text(3) == text(3)
    assert text(3) != text(4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be at most 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": float("nan")}, "temperature must be"),
    ],
)
def test_what_is_out_of_range_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        check(Sampling(**settings))
