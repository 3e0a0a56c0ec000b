from threading import Event

import pytest

from fleetune.toolkit.together import together


def test_results_come_in_the_order_of_the_parts():
    first = Event()

    def waits():
        assert first.wait(10)
        return "slow"

    def goes():
        first.set()
        return "quick"

    assert together(waits, goes) == ["slow", "quick"]


@pytest.mark.parametrize("error", [ValueError("rounds"), SystemExit(1)])
def test_one_that_fails_ends_it_though_the_others_wait_for_it_for_ever(error):
    def fails():
        raise error

    with pytest.raises(type(error)):
        together(lambda: Event().wait(5), fails, lambda: Event().wait(5))
