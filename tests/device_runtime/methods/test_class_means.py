import numpy as np
import pytest

from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, ClassHead, blank_sums
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.class_means import class_mean_head

HEAD = ClassHead("w", "b")


def sums_of(features, labels, num_classes):
    features = np.asarray(features, np.float64)
    is_of = np.eye(num_classes)[labels]
    return {SUMS: is_of.T @ features, COUNTS: is_of.sum(0), SQUARES: is_of.T @ np.square(features).sum(1)}


def logits(made, features):
    return np.asarray(features, np.float64) @ made["w"].T + made.get("b", 0)


def clusters(num_classes=6, width=12, each=20, *, seed=0, common=3.0):
    rng = np.random.default_rng(seed)
    means = common + rng.normal(size=(num_classes, width))
    labels = np.repeat(np.arange(num_classes), each)
    return means[labels] + 0.3 * rng.normal(size=(len(labels), width)), labels


def test_numbers_worked_by_hand():
    """Means 1 and 5, of all 3; variance within 4 / (4 - 2), about a mean of two samples 1 + 2/4 times that: scale 1/3."""
    made = class_mean_head(sums_of([[0, 0], [2, 0], [4, 0], [6, 0]], [0, 0, 1, 1], 2), HEAD)
    np.testing.assert_allclose(made["w"], [[-2 / 3, 0], [2 / 3, 0]], rtol=1e-6)
    np.testing.assert_allclose(made["b"], [4 / 3, -8 / 3], rtol=1e-6)
    assert {made["w"].dtype, made["b"].dtype} == {np.dtype("float32")}


def test_the_nearest_mean_wins():
    features, labels = clusters()
    made = class_mean_head(sums_of(features, labels, 6), HEAD)
    means = np.stack([features[labels == c].mean(0) for c in range(6)])
    drawn = np.random.default_rng(1).normal(size=(200, 12)) + 3
    nearest = np.square(drawn[:, None] - means).sum(2).argmin(1)
    assert np.array_equal(logits(made, drawn).argmax(1), nearest)


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0, 3.0])
def test_it_is_about_as_sure_as_it_is_right(noise):
    """Cross entropy within a tenth of the best that one more factor on the logits could reach, and never worse than no idea."""
    rng = np.random.default_rng(2)
    means, labels = rng.normal(size=(8, 30)), np.repeat(np.arange(8), 100)
    features, fresh = (means[labels] + noise * rng.normal(size=(800, 30)) for _ in range(2))
    found = logits(class_mean_head(sums_of(features, labels, 8), HEAD), fresh)

    def cross_entropy(z):
        return float(
            np.mean(np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - z[np.arange(800), labels])
        )

    best = min(cross_entropy(found * 2.0**power) for power in range(-6, 7))
    assert cross_entropy(found) <= min(np.log(8), best + 0.1 * np.log(8) + 0.5 * best)


def test_without_a_bias_the_common_mean_carries_it():
    features, labels = clusters(common=5.0)
    with_bias = class_mean_head(sums_of(features, labels, 6), HEAD)
    without = class_mean_head(sums_of(features, labels, 6), ClassHead("w"))
    assert without.keys() == {"w"}
    assert np.array_equal(logits(without, features).argmax(1), logits(with_bias, features).argmax(1))


def test_an_absent_class_is_neither_always_nor_never_predicted():
    features, labels = clusters()
    made = class_mean_head(sums_of(features, labels, 8), HEAD)  # 6 and 7 have no samples
    assert np.mean(logits(made, features).argmax(1) == labels) == 1.0
    middle = features.mean(0, keepdims=True)
    assert logits(made, middle).argmax(1) in (6, 7)
    assert not made["w"][6:].any()
    np.testing.assert_allclose(made["b"][6:], np.log(0.5), rtol=1e-6)


def test_of_one_class_alone_that_one_is_likelier_than_any_other_but_not_certain():
    features, labels = clusters(num_classes=1)
    made = class_mean_head(sums_of(features, labels + 2, 4), HEAD)
    found = np.exp(logits(made, features))
    np.testing.assert_allclose(
        found / found.sum(1, keepdims=True), [[0.2, 0.2, 0.4, 0.2]] * len(features), rtol=1e-5
    )


@pytest.mark.parametrize(
    "features",
    [
        [[1.0, 0.0], [0.0, 1.0]],  # one sample each: nothing known of the variance
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]],  # doubled: none
        [[1e15, 0.0], [0.0, 1e15]],
        [[1e-15, 0.0], [0.0, 1e-15]],
        [[1.0, 1.0], [1.0, 1.0]],  # all alike
        [[0.0, 0.0], [0.0, 0.0]],
    ],
)
@pytest.mark.parametrize("head", [HEAD, ClassHead("w")])
def test_samples_that_say_little_make_a_modest_head(features, head):
    labels = np.repeat([0, 1], len(features) // 2)
    made = class_mean_head(sums_of(features, labels, 2), head)
    assert all(np.isfinite(array).all() for array in made.values())
    found = logits(made, features)
    assert np.abs(found - found[:, ::-1]).max() < 300
    assert np.all(found[np.arange(len(labels)), labels] >= found.max(1) - 1e-3)


def test_no_sample_is_refused():
    with pytest.raises(ConfigError, match="none has a class"):
        class_mean_head(blank_sums(3, 4), HEAD)
