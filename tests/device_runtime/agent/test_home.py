from hashlib import sha256

import numpy as np
import pytest
from fleet import Device, first_adapter

from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.network.loopback import Loopback


def test_version_zero_is_packed_and_hashed_and_cannot_be_written_to():
    arrays = first_adapter()
    adapter = FirstAdapter.of(arrays)
    assert adapter.content == to_bytes(arrays)
    assert adapter.digest == sha256(adapter.content).hexdigest()
    with pytest.raises(ValueError, match="read-only"):
        adapter.arrays["w"][0] = 1.0
    arrays["w"][0] = 1.0  # the giver's own stay writable


def test_agents_share_one_version_zero_and_pack_nothing(tmp_path, monkeypatch):
    adapter = FirstAdapter.of(first_adapter())
    monkeypatch.setattr("fleetune.device_runtime.agent.home.to_bytes", lambda _: pytest.fail("packed again"))
    server = Loopback()
    devices = [Device(server, None, number, adapter=adapter).start() for number in range(3)]
    for device in devices:
        device.agent.poll(0.0)
    assert {id(device.agent._assignments._home.adapter.content) for device in devices} == {
        id(adapter.content)
    }
    np.testing.assert_array_equal(adapter.arrays["w"], first_adapter()["w"])
