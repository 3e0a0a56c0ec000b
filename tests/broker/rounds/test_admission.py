import pytest
from rounds_by_hand import task, update

from fleetune.broker.rounds.admission import identity, refusal
from fleetune.broker.rounds.open_round import REFUSALS_MAX, OpenRound, Standing


@pytest.fixture
def open_round():
    found = OpenRound(2, deadline=10.0)
    found.add([task("a", 2), task("b", 2, 1)])
    return found


def test_what_was_asked_for_is_seen(open_round):
    assert refusal(update("a", 2), open_round, {}, newest_round=2) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "c"}, "device 'c' was not asked in round 2"),
        ({"round_number": 3}, "round 3 is unknown; the newest is 2"),
        ({"round_number": 1}, "round 1 is closed"),
        ({"task_id": "train-2-b"}, "it answers task 'train-2-b'; this device's is 'train-2-a'"),
        ({"version": 0}, "it starts from version 0; round 2 starts from 1"),
        ({"codec": "int8"}, "its codec is 'int8'; 'fp32' was asked for"),
        ({"codec": "x" * 9000}, f"its codec is {'x' * 120!r}; 'fp32' was asked for"),
    ],
)
def test_a_refusal_says_what_is_wrong(open_round, changes, said):
    sent = update(**{"device": "a", "round_number": 2, **changes})
    assert refusal(sent, open_round, {}, newest_round=2) == said


def test_a_task_is_answered_once(open_round):
    said = refusal(update("a", 2), open_round, {"train-2-a"}, newest_round=2)
    assert said == "another update of this device is accepted in round 2"


def test_between_rounds_everything_is_too_late():
    assert refusal(update("a", 2), None, {}, newest_round=2) == "round 2 is closed"


def test_one_announcement_is_condemned_and_not_the_next(open_round):
    open_round.refuse("a", identity(update("a", 2)), "NaN in w")
    assert refusal(update("a", 2), open_round, {}, newest_round=2) == "NaN in w"
    assert refusal(update("a", 2, digest="better"), open_round, {}, newest_round=2) == ""


def test_refusals_are_remembered_with_a_limit_for_each_device(open_round):
    """A device that sends garbage for a night takes no memory, and no other device's refusals with it."""
    open_round.refuse("b", b"b", "NaN in w")
    for number in range(10 * REFUSALS_MAX):
        open_round.refuse("a", b"%d" % number, "garbage")
    known = [number for number in range(10 * REFUSALS_MAX) if open_round.refusal("a", b"%d" % number)]
    assert known == [*range(9 * REFUSALS_MAX, 10 * REFUSALS_MAX)]
    assert open_round.refusal("b", b"b") == "NaN in w"


def test_an_open_round_counts_as_it_lists(open_round):
    open_round.stand("b", Standing.REFUSED)
    open_round.stand("b", Standing.ACCEPTED)
    open_round.stand("b", Standing.ACCEPTED)
    assert {standing: open_round.count(standing) for standing in Standing} == {
        standing: len(open_round.of(standing)) for standing in Standing
    }
    assert (open_round.of(Standing.PENDING), open_round.standing("x")) == (("a",), None)
