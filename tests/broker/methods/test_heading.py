"""Where a fleet goes: votes, agreement with them, and which updates are left out for going against them."""

from itertools import permutations

import numpy as np
import pytest
from fleet import settings_of

from fleetune.broker.methods import heading as heading_module
from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.bounds import Measured, bounds
from fleetune.broker.methods.class_mean import class_mean
from fleetune.broker.methods.heading import AGAINST as AGAINST_COSINE
from fleetune.broker.methods.heading import Difference, Heading, Votes, least_agreement, squared
from fleetune.broker.methods.strategy import Update
from fleetune.broker.service.measures import Measures
from fleetune.broker.tasks import AGAINST, PARDONED, mark
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, ClassHead

SIZE = 20_000
REFERENCE = {"w": np.zeros(SIZE, np.float32)}
LIARS = ("l0", "l1", "l2")


def blank():
    return Heading({})


def voted(*directions):
    votes = Votes()
    for one in directions:
        votes.add({"w": np.asarray(one, np.float64)}, float(np.linalg.norm(one)))
    return votes


def moves(device, *, round_number=0, sign=1.0, common=0.5, length=1.0):
    """An update that shares a part of its way with all others."""
    rng = np.random.default_rng([round_number, *device.encode()])
    own = rng.standard_normal(SIZE) / np.sqrt(SIZE)
    way = common * np.full(SIZE, 1 / np.sqrt(SIZE)) + np.sqrt(1 - common**2) * own
    return Update({"w": (sign * length * way).astype(np.float32)}, REFERENCE, 10, device_id=device)


def a_round(measures, updates, strategy=None, noted=()):
    strategy = strategy or fedavg()
    for one in updates:
        measures.add(one, strategy)
    found = measures.bounds(strategy, REFERENCE, lambda: iter(updates), lambda: noted)
    marks = [one.device for one in measures.marks(found, 1, counts_all_alike=False) if one.kind == AGAINST]
    measures.begin(measures.next_heading(strategy, found, lambda: iter(updates)))
    return marks


def mixed(liars, *, round_number=0, num=5):
    honest = [moves(f"h{i}", round_number=round_number) for i in range(num - liars)]
    return honest + [moves(d, round_number=round_number, sign=-1, length=2.9) for d in LIARS[:liars]]


def test_votes_are_the_same_bits_in_any_order_and_can_be_taken_back():
    ways = [np.random.default_rng(i).standard_normal(5) for i in range(4)]
    totals = [voted(*order).total().tensors["w"].tobytes() for order in permutations(ways)]
    assert len(set(totals)) == 1
    votes = voted(*ways)
    votes.take_back({"w": ways[3]}, float(np.linalg.norm(ways[3])))
    assert votes.total().tensors["w"].tobytes() == voted(*ways[:3]).total().tensors["w"].tobytes()


def test_a_vote_is_a_direction_whatever_its_length():
    assert voted([3.0, 4.0], [0.0, -1e6], [0.0, 0.0]).total().tensors["w"] == pytest.approx([0.6, -0.2])


def test_agreement_is_the_cosine_and_its_own_vote_does_not_count():
    total = voted([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]).total()  # (0, 1)
    assert total.agreement({"w": np.array([3.0, 3.0])}, 3 * 2**0.5) == pytest.approx(0.5**0.5)
    assert total.agreement_of_others({"w": np.array([2.0, 0.0])}, 2.0) == pytest.approx(-(0.5**0.5))
    assert total.agreement({"w": np.zeros(2)}, 0.0) == 0.0
    assert total.agreement({"other": np.ones(2)}, 2**0.5) is None


def test_of_a_heading_the_next_round_keeps_a_share():
    after = voted([1.0, 0.0]).after(Heading({"w": np.array([0.0, 2.0], np.float32)}), kept=0.5)
    assert after["w"].tolist() == [1.0, 1.0]


def test_who_agrees_less_than_the_middle_one_may_weigh_and_move_less():
    told = {n: Measured(100, 1.0, 0.4) for n in "abcd"}
    told |= {
        "half": Measured(900, 50.0, 0.2),
        "none": Measured(900, 5.0, 0.0),
        "out": Measured(1, 1.0, -0.06),
    }
    found = bounds(told, weight_cap=3, length_cap=5, far=100)
    assert (found["half"].weight, found["half"].scale) == (200, 3 / 50)
    assert (found["none"].weight, found["none"].scale) == (100, 0.2)
    assert (found["out"].scale, found["out"].agreement) == (0.0, -0.06)
    assert found.keys() == {"half", "none", "out"}


def test_two_of_five_that_go_the_other_way_are_left_out_of_the_first_round():
    assert a_round(Measures(settings_of(clients=5)), mixed(2)) == ["l0", "l1"]


def test_three_of_five_are_left_out_once_it_is_known_where_the_fleet_goes():
    measures = Measures(settings_of(clients=5))
    assert a_round(measures, mixed(0)) == []
    assert a_round(measures, mixed(3, round_number=1)) == ["l0", "l1", "l2"]
    assert a_round(Measures(settings_of(clients=5)), mixed(3)) != ["l0", "l1", "l2"], (
        "by itself a round cannot"
    )


def test_a_device_that_has_nothing_in_common_with_the_others_is_not_left_out():
    measures = Measures(settings_of(clients=5))
    for number in range(4):
        unlike = moves("rare", round_number=number, common=0.0)
        assert a_round(measures, [*mixed(0, round_number=number), unlike]) == []


def test_where_honest_devices_are_spread_nobody_is_left_out_for_it():
    """Cosines of bge-small on MNLI, Dirichlet(1), one seed, nobody lying: the first three rounds, and the fourth."""
    before = [0.473, 0.354, 0.342, 0.298, 0.53, 0.048, 0.008, 0.102, 0.167, 0.067]
    now = [-0.321, -0.056, 0.365, -0.156, 0.236]
    assert least_agreement([*before, *now]) < min(now)
    minilm = [0.31, 0.29, 0.33, -0.18, 0.25, 0.01, 0.29, 0.23, 0.21, -0.04]  # the same of MiniLM, in int8
    assert least_agreement([*minilm, *(now := [0.07, 0.15, 0.28, 0.16, -0.1])]) < min(now)
    close = [0.3, 0.31, 0.28, 0.21, 0.4, 0.24, 0.25, 0.36, 0.23, 0.26]
    assert least_agreement([*close, 0.3, 0.25, -0.1, -0.7]) == -AGAINST_COSINE
    sly = [
        0.17,
        0.3,
        0.17,
        0.19,
        -0.18,
        0.23,
        0.23,
        0.2,
        0.38,
        -0.11,
        0.23,
        0.36,
        0.23,
        0.21,
    ]  # MiniLM on banking77
    assert least_agreement([*sly, -0.26]) == -AGAINST_COSINE
    assert least_agreement([]) == -AGAINST_COSINE


def test_how_closely_a_fleet_agrees_is_known_from_the_rounds_before():
    """One of five goes back: in a fleet that agreed closely it is left out, in one whose devices differ it is not."""
    way = moves("h0", common=1.0).values
    updates = [moves(f"h{i}", common=cosine) for i, cosine in enumerate([0.5, 0.5, 0.5, 0.5, -0.3])]
    for recent, out in (([0.5, 0.52, 0.48] * 5, ["h4"]), ([0.5, 0.0, -0.3, 0.2, 0.4] * 3, [])):
        left = way | {" agreements": np.array(recent, np.float32)}
        assert a_round(Measures(settings_of(clients=5), left), updates) == out


def test_who_went_back_before_is_not_excused_by_a_spread_fleet_until_it_is_pardoned():
    left = moves("h0", common=1.0).values | {" agreements": np.array([0.5, 0.0, -0.3, 0.2] * 4, np.float32)}
    updates = [moves(f"h{i}", common=cosine) for i, cosine in enumerate([0.5, 0.5, 0.5, -0.2, -0.2])]
    notes = [mark(1, "h3", AGAINST, "before"), mark(1, "h4", AGAINST, "before"), mark(2, "h4", PARDONED, "")]
    assert a_round(Measures(settings_of(clients=5), left), updates, noted=notes) == ["h3"]


def test_a_fleet_that_turns_is_judged_by_its_round():
    measures = Measures(settings_of(clients=5))
    a_round(measures, mixed(0))
    back = [moves(f"h{i}", round_number=1, sign=-1) for i in range(5)]
    assert a_round(measures, [*back, moves("l0", round_number=1)]) == ["l0"]


def test_few_devices_and_noise_and_sums_are_not_looked_at():
    for changes in ({"clients": 4}, {"clients": 5, "heading": 0.0}, {"clients": 5, "secure": "grid"}):
        measures = Measures(settings_of(**changes))
        assert a_round(measures, mixed(2)) == []
        assert measures.next_heading(fedavg(), {}, lambda: iter(())) == {}


def test_class_sums_that_point_the_other_way_are_left_out_and_leave_no_heading():
    def sums(device, sign, classes=3):
        features = np.zeros((4, 8))
        features[:classes] = sign * np.random.default_rng([*device.encode()]).normal(1, 0.3, (classes, 8))
        counts = np.array([1.0] * classes + [0.0] * (4 - classes))
        return Update(
            {SUMS: features, COUNTS: counts, SQUARES: np.square(features).sum(1)}, {}, 5, device_id=device
        )

    other = sums("rare", 1)._replace(
        values={**sums("rare", 1).values, SUMS: sums("rare", 1).values[SUMS][::-1]}
    )
    measures = Measures(settings_of(clients=5))
    strategy = class_mean(ClassHead("w"))
    updates = [*(sums(f"h{i}", 1) for i in range(3)), other, sums("liar", -1)]
    assert a_round(measures, updates, strategy) == ["liar"]
    assert a_round(measures, mixed(2)) == ["l0", "l1"], "judged by its own round"


def test_who_is_far_off_has_no_vote():
    honest = mixed(0, num=4)
    far = [moves("l0", sign=-1, length=100.0, common=0.0)]
    headings = []
    for updates in (honest, honest + far):
        measures = Measures(settings_of(clients=5))
        for one in updates:
            measures.add(one, fedavg())
        found = measures.bounds(fedavg(), REFERENCE, lambda updates=updates: iter(updates), tuple)
        headings.append(measures.next_heading(fedavg(), found, lambda updates=updates: iter(updates)))
    assert headings[0]["w"].tobytes() == headings[1]["w"].tobytes()


@pytest.mark.parametrize("shape", [(2**14,), (2**12, 2), (2**13, 1)])
def test_a_direction_of_another_shape_than_the_heading_is_no_cosine(shape):
    heading = Heading({"w": np.ones(shape, np.float32)})
    with pytest.raises(ValueError, match="one shape"):
        heading.agreement({"w": np.ones(2**13)}, 1.0)


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 30_000])
@pytest.mark.parametrize("cut", [False, True])
def test_a_squared_distance_is_that_of_the_difference_to_the_bit(size, cut):
    rng = np.random.default_rng(size)
    one, other = rng.standard_normal((2, 2, size)).astype(np.float32)
    if cut:  # components of a tensor: they do not lie together
        one, other = one[:, : size // 2], other[:, : size // 2]
    assert squared(Difference(one, other)) == squared(np.subtract(one, other, dtype=np.float64))


def test_a_distance_of_other_shapes_is_none():
    with pytest.raises(ValueError, match="one shape"):
        Difference(np.zeros((2, 3)), np.zeros((3, 2)))


@pytest.mark.parametrize("size", [1, 8192, 30_000])
def test_a_difference_votes_and_agrees_as_what_it_is_made_of_to_the_bit(size):
    rng = np.random.default_rng(size)
    one, other, before = rng.standard_normal((3, size)).astype(np.float32)
    found = []
    for way in (Difference, lambda value, start: np.subtract(value, start, dtype=np.float64)):
        votes = Votes()
        for value in (one, other):
            votes.add({"w": way(value, before)}, 3.7)
        votes.take_back({"w": way(other, before)}, 3.7)
        total = votes.total()
        found.append((total.tensors["w"].tobytes(), total.agreement({"w": way(other, before)}, 3.7)))
    assert found[0] == found[1]
    assert any(found[0][0])


def test_more_votes_than_are_held_at_once_are_the_same_bits(monkeypatch):
    ways = [np.random.default_rng(i).standard_normal(50) for i in range(9)]
    total = voted(*ways).total().tensors["w"].tobytes()
    after = voted(*ways).after(Heading({"w": ways[0]}), kept=0.5)["w"].tobytes()
    for limit in (1, 2, 4, 9):
        monkeypatch.setattr(heading_module, "_HELD_MAX", limit)
        assert voted(*ways).total().tensors["w"].tobytes() == total
        assert voted(*ways).after(Heading({"w": ways[0]}), kept=0.5)["w"].tobytes() == after


@pytest.mark.parametrize("size", [1, 3, 8191, 8192, 8193, 40_000])
def test_a_sum_of_squares_is_that_of_all_elements(size):
    value = np.random.default_rng(size).integers(-9, 9, size).astype(np.float64)
    assert squared(value) == float(np.sum(value * value))
