"""Cases of the crowd: a misspelt one is refused, not measured as another."""

import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.benchmark import load

crowd = load("crowd")


def test_a_case_says_devices_size_way_and_how_many_are_lost():
    assert crowd.parsed("20x3-without8") == (20, 3.0, "without8", 8)
    assert crowd.parsed("20x3-silent8") == (20, 3.0, "silent8", 8)
    assert crowd.parsed("3000x0.01-restart") == (3000, 0.01, "restart", 0)
    assert [crowd.parsed(case)[3] for case in crowd.CASES] == [0] * len(crowd.CASES)


@pytest.mark.parametrize(
    "case", ["", "20", "x3", "0x3", "20x3-", "20x3-restrat", "20x3-without", "20x3-without20", "-20x3"]
)
def test_what_is_no_case_is_refused(case):
    with pytest.raises(ConfigError, match="DEVICESxMB"):
        crowd.parsed(case)
