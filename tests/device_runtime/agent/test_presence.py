from hashlib import sha256

from fleet import ARTIFACT, first_adapter
from stage import NAME

from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.wire import DeviceStatus, Hello


def test_it_says_hello_and_that_it_is_online(stage):
    stage.poll(3)
    status, hello = stage.aggregator.heard()
    assert status == DeviceStatus(device_id=NAME, online=True)
    holds = sha256(to_bytes(first_adapter())).hexdigest()
    assert hello == Hello(device_id=NAME, artifact=ARTIFACT, num_samples=8, holds=holds)


def test_its_will_says_that_it_is_gone(stage):
    stage.poll()
    stage.device.kill()
    assert stage.aggregator.heard(DeviceStatus)[-1] == DeviceStatus(device_id=NAME, online=False)


def test_it_says_hello_again_after_a_reconnection_a_new_session_and_a_long_silence(stage):
    stage.poll()
    stage.aggregator.heard()
    stage.server.restart()
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1
    stage.aggregator.status("one")
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1
    stage.aggregator.status("one")
    stage.poll(2)
    assert stage.aggregator.heard(Hello) == []
    stage.now += 29
    stage.poll(2)
    assert stage.aggregator.heard(Hello) == []
    stage.now += 2
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1


def test_a_new_session_is_greeted_in_the_middle_of_training(stage):
    stage.aggregator.status("one")
    stage.poll(2)
    stage.aggregator.offer()
    stage.poll(2)
    assert stage.device.kinds() == ["aggregator", "offer"]
    stage.aggregator.heard()
    stage.aggregator.status("two")
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1


def test_the_aggregator_is_told_of_when_it_goes_and_when_it_is_here_again(stage):
    stage.aggregator.status("one")
    stage.poll(2)
    assert stage.device.agent.has_status
    for session, online in (("one", False), ("one", False), ("one", True), ("one", False), ("two", True)):
        stage.aggregator.status(session, online=online)
        stage.poll(2)
    said = ["aggregator: here"] + 2 * ["aggregator: away; waiting for it", "aggregator: here"]
    assert [str(event) for event in stage.device.events] == said
