"""Devices that vanish in the middle of a round, in whole jobs under a pretended clock: real agents, service, ledger and wills."""

import pytest
from fleet import in_process, world

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.methods.selection import Roster
from fleetune.broker.rounds.open_round import OpenRound
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.terms.terms import Terms

SIX = range(6)
PATIENT = Patience(deadline_s=600, grace_s=10)


def begun(folder, *, min_clients=4, patience=PATIENT, **changes):
    """A job whose device 5 has taken its first offer."""
    found = world(folder, numbers=SIX, rounds=1, min_clients=min_clients, patience=patience, **changes)
    return found.run(until=lambda: "offer" in found.devices[5].kinds())


def without_the_last(found):
    return in_process(SIX, rounds=1, settings=found.aggregator.settings, drop={(1, 5)})


def test_a_round_closes_a_grace_after_one_has_vanished_with_the_bits_of_the_others(tmp_path):
    found = begun(tmp_path)
    found.devices.pop().kill()
    found.run()
    assert 10 <= found.now < 20
    assert found.aggregator.version(1) == without_the_last(found)


@pytest.mark.parametrize("kills", [{3}, {4, 6, 9}, set(range(3, 40))])
def test_an_aggregator_that_is_killed_meanwhile_hears_of_it_again_and_does_the_same(tmp_path, kills):
    found = begun(tmp_path)
    found.devices.pop().kill()
    found.run_killed_at(kills)
    assert found.aggregator.starts > 1
    assert found.now < 60
    assert found.aggregator.version(1) == without_the_last(found)


def test_who_is_back_within_the_grace_costs_no_bit(tmp_path):
    found = begun(tmp_path)
    found.devices[5].kill()
    found.run(until=lambda: found.now >= 5 or found.aggregator.service.due_at(found.now) > found.now + 5)
    found.devices[5].start()
    found.run()
    expected = in_process(SIX, rounds=1, settings=found.aggregator.settings)
    assert found.aggregator.version(1) == expected


def test_a_round_that_needs_all_waits_for_it(tmp_path):
    found = begun(tmp_path, min_clients=6)
    found.devices[5].kill()
    found.run(until=lambda: found.now > 700)
    found.devices[5].start()
    found.run()
    assert found.aggregator.version(1) == in_process(SIX, rounds=1, settings=found.aggregator.settings)


def test_devices_whose_owners_do_not_allow_the_work_end_the_job_with_what_they_say(tmp_path):
    found = world(tmp_path, numbers=(0, 1), rounds=1, patience=PATIENT)
    for device in found.devices:
        device.kill()
        device.terms = Terms(least_samples=100)
        device.start()
    said = r"round 1: 0 of at least 2 updates, and declined by device-0: .*least_samples.*; device-1: .*least_samples"
    with pytest.raises(ConfigError, match=said):
        found.run()
    found.aggregator.kill()
    for device in found.devices:
        device.kill()
        device.terms = None
        device.start()
    found.aggregator.start(found.now)
    found.run()
    assert found.aggregator.rows[-1].round == 1, "the same job goes on once they do"


def test_no_word_of_a_device_is_a_look_at_the_whole_fleet(tmp_path, monkeypatch):
    def whole(*_):
        raise AssertionError("all devices were gone through")

    found = world(tmp_path, numbers=SIX, rounds=1, patience=PATIENT)
    found.run(until=lambda: "offer" in found.devices[5].kinds())
    monkeypatch.setattr(Roster, "present", property(whole))
    monkeypatch.setattr(OpenRound, "of", whole)
    for device in found.devices[:5]:
        device.kill()
        device.start()
    found.run(until=lambda: len(found.aggregator.ledger.past().accepted) == 5)


def stopped(folder, *, rounds=2, **changes):
    """A job whose device 5 is stopped as it is asked for its update: its connection stands, and it says nothing any more."""
    found = world(folder, numbers=SIX, rounds=rounds, min_clients=4, patience=PATIENT, **changes)
    found.run(until=lambda: found.aggregator.service._uploads._pulls.share_of("device-5") == 0)
    found.turns.leave(found.devices[5].link)
    return found


def test_who_stops_while_it_uploads_and_leaves_no_will_is_waited_for_as_one_that_is_gone(tmp_path):
    found = stopped(tmp_path).run()
    assert 10 <= found.now < 30, "the second round does not ask it"
    settings = found.aggregator.settings
    assert found.aggregator.version(2) == in_process(SIX, rounds=2, settings=settings, drop={(1, 5), (2, 5)})


def test_who_goes_on_within_the_grace_costs_no_bit(tmp_path):
    found = stopped(tmp_path)
    found.run(until=lambda: found.now >= 9 or found.aggregator.service.due_at(found.now) >= found.now + 9)
    found.turns.join(found.devices[5].link, found.devices[5].agent)
    found.run()
    assert found.aggregator.version(2) == in_process(SIX, rounds=2, settings=found.aggregator.settings)


def test_who_goes_on_later_is_asked_again_once_it_is_heard(tmp_path):
    found = stopped(tmp_path, rounds=3)
    found.run(until=lambda: found.aggregator.service.federation.rounds.closed == 1)
    assert "device-5" not in found.aggregator.service.federation.rounds.roster
    found.turns.join(found.devices[5].link, found.devices[5].agent)
    found.run(until=lambda: "device-5" in found.aggregator.service.federation.rounds.roster)
    found.run()
