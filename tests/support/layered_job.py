"""Jobs of a model of 12 layers, for the configurators that choose depths."""

import msgspec
import pytest
from rounds_by_hand import job

from fleetune.broker.job import Settings
from fleetune.device_runtime.contracts.wire import PolicySpec


class _Deep(Settings, frozen=True, kw_only=True):
    num_layers: int = 0


def deep_job(*, num_layers=12, **changes):
    """Settings as :func:`rounds_by_hand.job` makes them."""
    return _Deep(**{**msgspec.structs.asdict(job(**changes)), "num_layers": num_layers})


def needs_blocks(name):
    """Mark what waits for the policy \"block\"."""
    is_there = "width" in PolicySpec.__struct_fields__
    return pytest.mark.skipif(name in ("slt", "fedcybgd") and not is_there, reason="no policy 'block' yet")
