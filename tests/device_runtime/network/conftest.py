import pytest

from fleetune.device_runtime.network import paho_client


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A lost connection is tried again soon: no test has to sit a second out."""
    monkeypatch.setattr(paho_client, "RECONNECT_S", (0.1, 15))
