"""A day's amounts across restarts, and clocks that jump."""

import pytest

from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.terms import day
from fleetune.device_runtime.terms.day import Day, boot_id

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
    this = Day(outbox, wall_s=NOON)
    this.add(0.0, wall_s=NOON, sent_bytes=10, key="one")
    assert this.spent(24 * HOUR - 1).sent_bytes == 10
    assert this.spent(24 * HOUR).sent_bytes == 0
    assert Day(outbox, wall_s=NOON + 25 * HOUR).spent(0.0).rounds == 0


@pytest.mark.parametrize("jump", [-10 * 365 * 24 * HOUR, -2 * 24 * HOUR])
def test_a_clock_set_back_gives_no_second_allowance_and_does_not_hold_a_day_for_ever(outbox, jump):
    Day(outbox, wall_s=NOON).add(0.0, wall_s=NOON, key="one")
    back = Day(outbox, wall_s=NOON + jump)
    assert back.spent(0.0).rounds == 1
    assert back.spent(24 * HOUR).rounds == 0


def test_a_clock_set_forward_while_it_runs_gives_none(outbox):
    this = Day(outbox, wall_s=NOON)
    this.add(0.0, wall_s=NOON, key="one")
    this.add(1.0, wall_s=NOON + 100 * 24 * HOUR, key="two")
    assert this.spent(2.0).rounds == 2


def test_a_board_without_a_clock_that_learns_the_time_gets_none(outbox):
    Day(outbox, wall_s=20.0).add(0.0, wall_s=30.0, key="one")
    assert Day(outbox, wall_s=NOON).spent(0.0).rounds == 1


@pytest.mark.parametrize("jump_s", [-100 * HOUR, 5 * HOUR, 100 * HOUR])
def test_a_clock_set_between_two_processes_of_one_boot_changes_nothing(outbox, jump_s):
    Day(outbox, wall_s=NOON, boot="b", boot_s=0.0).add(0.0, wall_s=NOON, key="one")
    again = Day(outbox, wall_s=NOON + jump_s, boot="b", boot_s=2 * HOUR)
    assert (again.spent(2 * HOUR).rounds, again.spent(2 * HOUR).elapsed_s) == (1, 2 * HOUR)
    assert again.spent(24 * HOUR).rounds == 0


def test_after_another_boot_the_wall_clock_counts(outbox):
    Day(outbox, wall_s=NOON, boot="b", boot_s=9 * HOUR).add(9 * HOUR, wall_s=NOON, key="one")
    assert Day(outbox, wall_s=NOON + HOUR, boot="c", boot_s=1.0).spent(1.0).elapsed_s == HOUR
    assert Day(outbox, wall_s=NOON + HOUR).spent(1.0).elapsed_s == HOUR
    assert Day(outbox, wall_s=NOON + 25 * HOUR, boot="c", boot_s=1.0).spent(1.0).rounds == 0


def test_this_system_says_which_boot_it_is_or_nothing(monkeypatch, tmp_path):
    assert boot_id() == boot_id()
    monkeypatch.setattr(day, "_BOOT_ID", tmp_path / "none")
    assert boot_id() == ""


@pytest.mark.parametrize("kept", [b"", b"\xff", b"{}", b'{"rounds": -1}', b'{"rounds": "many"}', b"[" * 5000])
def test_damaged_counts_are_none(outbox, kept):
    outbox.remember("contract/day", kept)
    assert Day(outbox, wall_s=NOON).spent(0.0).rounds == 0
