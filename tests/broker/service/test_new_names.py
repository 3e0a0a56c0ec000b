"""Names without end cost no more each than the first ones: counted in steps of the interpreter, not in seconds."""

import pytest
from fleet import ARTIFACT, JOB
from steps import Steps
from stranger import Stranger

from fleetune.device_runtime.contracts.wire import DeviceStatus, Hello, device_topic, encode

FEW = 200


def comes(service, number, *, goes=True):
    """A device that was never here says hello and, if it goes, leaves."""
    name = f"new-{number:06}"
    service.take(
        device_topic(JOB, name, "up"), encode(Hello(device_id=name, artifact=ARTIFACT, num_samples=5)), 0.0
    )
    service.tick(0.0)
    if goes:
        status = DeviceStatus(device_id=name, online=False)
        service.take(device_topic(JOB, name, "status"), encode(status), 0.0)
        service.tick(0.0)
    service.due_at(0.0)


@pytest.mark.parametrize("clients", [4, 20_000], ids=["a round is open", "none can begin"])
@pytest.mark.parametrize("goes", [True, False], ids=["it leaves", "it stays"])
@pytest.mark.parametrize("many", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_names_later_one_costs_what_it_did(tmp_path, many, clients, goes):
    service = Stranger(tmp_path, clients=clients, min_clients=clients).aggregator.service
    for number in range(FEW):
        comes(service, number, goes=goes)
    with Steps() as early:
        comes(service, FEW, goes=goes)
    for number in range(FEW + 1, many):
        comes(service, number, goes=goes)
    with Steps() as late:
        comes(service, many, goes=goes)
    assert early.number > 100
    assert late.number <= 1.2 * early.number
