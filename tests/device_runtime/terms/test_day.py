"""A day's amounts across restarts, and clocks that jump."""

import pytest

from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.terms.day import Day

NOON = 1_800_000_000.0
HOUR = 3600.0


@pytest.fixture
def outbox(tmp_path):
    with OutboxFile(tmp_path / "outbox.sqlite") as found:
        yield found


def test_counts_are_there_after_a_restart_and_an_offer_counts_once(outbox):
    Day(outbox, wall_s=NOON).add(5.0, wall_s=NOON, sent_bytes=10, key="one")
    again = Day(outbox, wall_s=NOON + HOUR)
    again.add(0.0, wall_s=NOON + HOUR, sent_bytes=5, key="one")
    spent = again.spent(0.0)
    assert (spent.rounds, spent.sent_bytes, spent.elapsed_s) == (1, 15, HOUR)
    again.add(0.0, wall_s=NOON, key="two")
    assert again.spent(0.0).rounds == 2


def test_a_day_later_nothing_is_spent(outbox):
    day = Day(outbox, wall_s=NOON)
    day.add(0.0, wall_s=NOON, sent_bytes=10, key="one")
    assert day.spent(24 * HOUR - 1).sent_bytes == 10
    assert day.spent(24 * HOUR).sent_bytes == 0
    assert Day(outbox, wall_s=NOON + 25 * HOUR).spent(0.0).rounds == 0


@pytest.mark.parametrize("jump", [-10 * 365 * 24 * HOUR, -2 * 24 * HOUR])
def test_a_clock_set_back_gives_no_second_allowance_and_does_not_hold_a_day_for_ever(outbox, jump):
    Day(outbox, wall_s=NOON).add(0.0, wall_s=NOON, key="one")
    back = Day(outbox, wall_s=NOON + jump)
    assert back.spent(0.0).rounds == 1
    assert back.spent(24 * HOUR).rounds == 0


def test_a_clock_set_forward_while_it_runs_gives_none(outbox):
    day = Day(outbox, wall_s=NOON)
    day.add(0.0, wall_s=NOON, key="one")
    day.add(1.0, wall_s=NOON + 100 * 24 * HOUR, key="two")
    assert day.spent(2.0).rounds == 2


def test_a_board_without_a_clock_that_learns_the_time_gets_none(outbox):
    Day(outbox, wall_s=20.0).add(0.0, wall_s=30.0, key="one")
    assert Day(outbox, wall_s=NOON).spent(0.0).rounds == 1


@pytest.mark.parametrize("kept", [b"", b"\xff", b"{}", b'{"rounds": -1}', b'{"rounds": "many"}', b"[" * 5000])
def test_damaged_counts_are_none(outbox, kept):
    outbox.remember("contract/day", kept)
    assert Day(outbox, wall_s=NOON).spent(0.0).rounds == 0
