from hashlib import sha256

from fleet import ARTIFACT, Device, first_adapter
from stage import NAME

from fleetune.device_runtime.agent.jitter import Jitter
from fleetune.device_runtime.agent.presence import HELLO_S, SPREAD_S
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.wire import DeviceStatus, Hello
from fleetune.device_runtime.network.loopback import Loopback


def test_it_says_hello_and_that_it_is_online(stage):
    stage.poll(3)
    status, hello = stage.aggregator.heard()
    assert status == DeviceStatus(device_id=NAME, online=True)
    holds = sha256(to_bytes(first_adapter())).hexdigest()
    assert hello == Hello(device_id=NAME, artifact=ARTIFACT, num_samples=8, holds=holds, listens=True)


def test_its_will_says_that_it_is_gone(stage):
    stage.poll()
    stage.device.kill()
    assert stage.aggregator.heard(DeviceStatus)[-1] == DeviceStatus(device_id=NAME, online=False)


def test_it_says_hello_again_after_a_reconnection_a_new_session_and_a_long_silence(stage):
    stage.poll()
    stage.aggregator.heard()
    stage.now += 10
    stage.server.restart()
    stage.poll()
    stage.now += SPREAD_S
    stage.poll()
    assert len(stage.aggregator.heard(Hello)) == 1
    stage.aggregator.status("one")
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1
    stage.aggregator.status("one")
    stage.poll(2)
    assert stage.aggregator.heard(Hello) == []
    stage.now += 0.75 * HELLO_S - 1
    stage.poll(2)
    assert stage.aggregator.heard(Hello) == []
    stage.now += HELLO_S / 4 + 1
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1


def test_devices_that_hear_the_same_say_hello_one_after_another(tmp_path):
    """A server that is back, or an aggregator: 3,000 hellos in one moment overran it."""
    times = []
    for number in range(20):
        device = Device(Loopback(), tmp_path, number).start()
        device.agent.poll(0.0)
        device.server.restart()
        device.agent.poll(10.0)
        times.append(device.agent.due_at(10.0) - 10.0)
        device.kill()
    assert len(set(times)) == 20
    assert 0 <= min(times) < 0.25 * SPREAD_S < 0.75 * SPREAD_S < max(times) < SPREAD_S


def test_a_device_draws_the_same_times_again():
    drawn = [[Jitter(name).around(30.0), Jitter(name).within(1.0)] for name in ("a", "a", "b")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 22.5 <= drawn[0][0] <= 30.0


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
