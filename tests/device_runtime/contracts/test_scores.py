"""The figure that a model is judged by is called what it is."""

from math import e, inf, isnan, nan

import msgspec
import pytest

from fleetune.broker.store.rows import Measurement, Row, called
from fleetune.device_runtime.contracts.scores import EXACT_MATCH, PERPLEXITY, R2, named, perplexity, score_of


def test_perplexity():
    assert perplexity(1.0) == e
    assert perplexity(0.0) == 1
    assert perplexity(1e300) == perplexity(710.0) == inf
    assert isnan(perplexity(nan))


@pytest.mark.parametrize(
    ("fields", "score"),
    [
        ({"labels": ("a", "b")}, "accuracy"),
        ({"labels": ("a",), "problem_type": "regression"}, "r2"),
        ({"labels": ("a", "b"), "problem_type": "multi_label_classification"}, "exact_match"),
        ({"labels": (), "task": "causal-lm"}, "perplexity"),
    ],
)
def test_the_manifest_says_what_a_model_is_judged_by(make_manifest, fields, score):
    described = msgspec.structs.replace(make_manifest(), **fields)
    assert score_of(described) == score


@pytest.mark.parametrize("score", [EXACT_MATCH, R2])
def test_what_is_told_as_accuracy_goes_where_it_belongs(score):
    told = Row(
        round=1,
        devices=1,
        loss=2.0,
        accuracy=0.5,
        evaluations={"d": Measurement(loss=2.0, accuracy=0.5, num_samples=3)},
    )
    row = called(told, score)
    for found in (row, row.evaluations["d"]):
        assert (found.accuracy, getattr(found, score)) == (None, 0.5)
    assert row.score == score
    assert called(told, "").accuracy == 0.5


def test_a_language_model_has_a_perplexity_beside_the_accuracy_of_its_tokens():
    found = named(Row(round=1, devices=1, loss=2.0, accuracy=0.5), PERPLEXITY)
    assert (found.perplexity, found.accuracy) == (pytest.approx(e**2), 0.5)
    assert named(Row(round=1, devices=1), PERPLEXITY).perplexity is None
    assert named(Row(round=1, devices=1, loss=1e4, accuracy=0.0), PERPLEXITY).perplexity is None
