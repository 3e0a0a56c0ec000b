"""How many lanes a batch gets, and work on all of them at once."""

import threading

import pytest

from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.engine.lanes import Lanes, Rows, count_cores, rows_for
from fleetune.device_runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("rows", "threads", "lanes"),
    [(8, 1, 1), (1, 1, 1), (1, 2, 1), (2, 2, 2), (3, 2, 1), (7, 2, 2), (5, 4, 1), (7, 4, 4), (10, 4, 4)],
)
def test_lanes_are_filled_to_four_fifths(rows, threads, lanes) -> None:
    assert rows_for(rows, 0, threads) == Rows(lanes)


@pytest.mark.parametrize(("tokens", "lanes"), [(0, 2), (23, 1), (24, 2), (512, 2)])
def test_a_lane_has_enough_tokens(tokens, lanes) -> None:
    assert rows_for(8, tokens, 2) == Rows(lanes)


@pytest.mark.parametrize(("micro_batch", "lanes"), [(0, 2), (1, 1), (4, 2), (3, 1), (100, 2)])
def test_the_rows_of_a_micro_batch_are_what_counts(micro_batch, lanes) -> None:
    memory = MemoryPlan(micro_batch, streamed=True)
    assert rows_for(8, 0, 2, memory) == Rows(lanes, memory)


@pytest.mark.parametrize(
    ("micro_tokens", "tokens", "lanes"), [(0, 96, 2), (96, 96, 1), (192, 96, 2), (384, 96, 2), (288, 96, 1)]
)
def test_the_tokens_of_a_micro_batch_are_what_counts(micro_tokens, tokens, lanes) -> None:
    memory = MemoryPlan(micro_tokens=micro_tokens)
    assert rows_for(8, tokens, 2, memory) == Rows(lanes, memory)


def test_a_number_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="micro_tokens must be at least 0, got -2"):
        rows_for(8, 0, 2, MemoryPlan(micro_tokens=-2))
    with pytest.raises(ConfigError, match="micro_batch must be at least 0, got -1"):
        rows_for(8, 0, 2, MemoryPlan(-1))


def test_parts_run_at_the_same_time_and_keep_their_order() -> None:
    meeting = threading.Barrier(2, timeout=30)
    lanes = Lanes(2)
    assert lanes.each(lambda part: (meeting.wait(), part)[1], ["a", "b"]) == ["a", "b"]
    lanes.close()


def test_a_failure_waits_for_the_others_and_is_raised() -> None:
    done, lanes = threading.Event(), Lanes(2)

    def work(part: str) -> None:
        if part == "bad":
            raise ValueError(part)
        done.set()

    with pytest.raises(ValueError, match="bad"):
        lanes.each(work, ["bad", "good"])
    assert done.is_set()
    lanes.close()


def test_there_is_a_core() -> None:
    assert count_cores() >= 1
