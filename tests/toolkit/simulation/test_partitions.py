"""Partitions: no example twice, every device its least, the same by seed; and what each kind is for."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.device_runtime.errors import ConfigError, DataError
from fleetune.toolkit.simulation.partitions import KINDS, Partition, Subject, partition, read_column, shares

CODE = """
def rows(labels, column, num_devices, seed):
    return [range(i, len(labels), num_devices) for i in range(num_devices)]
"""


def subject_of(labels, column=()):
    return Subject(np.asarray(labels, np.int64), lambda name: column)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return f"{path}:rows"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=60, max_size=200),
    devices=st.integers(1, 12),
    least=st.integers(0, 5),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 2**53 - 1),
)
def test_no_example_is_used_twice_and_every_device_has_its_least(
    code, kind, labels, devices, least, alpha, seed
):
    own = {"dirichlet": {"alpha": alpha}, "by": {"column": "who"}, "code": {"code": code}}.get(kind, {})
    who = [str(i % 12) for i in range(len(labels))]
    wanted = Partition(kind=kind, devices=devices, min_samples=least, **own)
    parts = partition(subject_of(labels, who), wanted, seed=seed)
    taken = np.concatenate(parts)
    assert len(parts) == devices
    assert len(np.unique(taken)) == len(taken) == len(labels), "none twice, and none is left over"
    assert all(len(part) >= least and (np.diff(part) > 0).all() for part in parts)
    again = partition(subject_of(labels, who), wanted, seed=seed)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def mean_classes(labels, **wanted):
    parts = partition(subject_of(labels), Partition(devices=20, **wanted), seed=3)
    return np.mean([share.classes for share in shares(np.asarray(labels), parts)])


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    labels = np.arange(2000) % 10
    few, some, all_of_them = (mean_classes(labels, kind="dirichlet", alpha=a) for a in (0.05, 0.5, 1000.0))
    assert few < some < all_of_them == 10


def test_shards_give_about_so_many_classes():
    labels = np.arange(2000) % 10
    assert mean_classes(labels, kind="shards", classes=1) == 1
    assert 2 <= mean_classes(labels, kind="shards", classes=3) <= 3.5


def test_seeds_give_partitions_of_their_own():
    labels = np.arange(300) % 5
    for kind in ("dirichlet", "quantity", "shards", "iid"):
        a, b = (partition(subject_of(labels), Partition(kind=kind, devices=4), seed=seed) for seed in (1, 2))
        assert any(len(x) != len(y) or (x != y).any() for x, y in zip(a, b, strict=True)), kind


def test_quantities_differ_as_asked_and_labels_do_not():
    labels = np.arange(4000) % 4
    sizes = {
        spread: sorted(
            map(
                len,
                partition(subject_of(labels), Partition(kind="quantity", devices=10, spread=spread), seed=1),
            )
        )
        for spread in (0.0, 1.5)
    }
    assert sizes[0.0] == [400] * 10
    assert sizes[1.5][-1] > 10 * sizes[1.5][0]
    law = Partition(kind="quantity", sizes="power-law", spread=1.0, devices=4, min_samples=0)
    assert sorted(map(len, partition(subject_of(labels), law, seed=1))) == [480, 640, 960, 1920], (
        "25 : 33 : 50 : 100"
    )


def test_a_value_of_the_column_stays_on_one_device_and_none_is_split():
    who = ["ann"] * 50 + ["bob"] * 30 + ["cem"] * 25 + ["dee"] * 5
    parts = partition(subject_of([0] * 110, who), Partition(kind="by", column="who", devices=2), seed=0)
    assert [len(part) for part in parts] == [55, 55]
    one_each = partition(subject_of([0] * 110, who), Partition(kind="by", column="who"), seed=0)
    assert [len(part) for part in one_each] == [50, 30, 25, 5]
    with pytest.raises(ConfigError, match="has 4 values, which do not reach 5 devices"):
        partition(subject_of([0] * 110, who), Partition(kind="by", column="who", devices=5), seed=0)
    with pytest.raises(ConfigError, match="devices 3 have fewer than 6"):
        partition(subject_of([0] * 110, who), Partition(kind="by", column="who", min_samples=6), seed=0)
    with pytest.raises(DataError, match="110 values for 3 examples"):
        partition(subject_of([0] * 3, who), Partition(kind="by", column="who"), seed=0)


def test_empty_devices_are_there_where_they_are_allowed_and_reported():
    labels = np.zeros(20, np.int64)
    parts = partition(
        subject_of(labels), Partition(kind="dirichlet", devices=10, alpha=1e-3, min_samples=0), seed=0
    )
    assert sorted((share.samples, share.classes) for share in shares(labels, parts)) == [(0, 0)] * 9 + [
        (20, 1)
    ]


def test_too_few_examples_are_told():
    with pytest.raises(ConfigError, match="10 devices of at least 3 examples need 30; there are 20"):
        partition(subject_of([0] * 20), Partition(kind="iid", devices=10, min_samples=3), seed=0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [[0], [0]]", "an example is given twice"),
        ("return [[0], [99]]", "index 99; expected 0 to 9"),
        ("return [[-1], [2]]", "index -1; expected 0 to 9"),
        ("return [[0]]", "1 lists for 2 devices"),
        ("return [[0], []]", "devices 1 have fewer than min_samples (1)"),
        ("return 3", "no list of indices for each device: TypeError"),
        ("return [[float('nan')], [1]]", "no list of indices for each device"),
        ("return column['x']", "no list of indices for each device"),
        ("return 1 / 0", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_user_code_is_held_to_the_law(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"def rows(labels, column, num_devices, seed):\n    {body}\n")
    wanted = Partition(kind="code", code=f"{tmp_path / 'mine'}:rows", devices=2)
    with pytest.raises(ConfigError, match=re.escape(said)):
        partition(subject_of(range(10)), wanted, seed=0)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("mine", "expected FILE.py:FUNCTION"),
        ("none:f", "expected FILE.py:FUNCTION"),
        ("mine:g", "no function 'g'"),
        ("bad:f", "cannot be loaded: SyntaxError"),
    ],
)
def test_user_code_that_is_not_there_is_told(tmp_path, code, said):
    (tmp_path / "mine.py").write_text("x = 1")
    (tmp_path / "bad.py").write_text("x = (")
    with pytest.raises(ConfigError, match=said):
        partition(subject_of(range(10)), Partition(kind="code", code=str(tmp_path / code), devices=2), seed=0)


def test_a_column_is_read_from_lines_and_from_arrays(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "client": "ann"}\n{"text": "y", "client": 3}\n')
    (tmp_path / "a.csv").write_text("text,client\nx,ann\ny,3\n")
    np.savez(tmp_path / "a.npz", client=np.array(["ann", "3"]), x=np.zeros(2))
    for name in ("a.jsonl", "a.csv", "a.npz"):
        assert read_column(tmp_path / name, "client") == ["ann", "3"]
        with pytest.raises(DataError, match=r"no .*role"):
            read_column(tmp_path / name, "role")
