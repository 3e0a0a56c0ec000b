"""Configurators that learn, in a whole job whose aggregator is killed: the choices are those of an undisturbed one."""

import pytest
from fleet import FOUR, Aggregator, Device, Step, World, workbench_of

from fleetune.broker.methods import caff, controls, fedadapter
from fleetune.device_runtime.network.loopback import Loopback

LAYERS = 12


def choices(folder, configurator, *, kills=()):
    """Works of a job of six rounds, by device; device n takes n + 1 seconds a step, and gains less the more it trains."""
    made = {n: [] for n in FOUR}

    def timed(number):
        def wrap(training):
            step = training.step

            def stepped():
                report = step()
                training.history[-1] = Step(report.loss, seconds=1.0 + number)
                return training.history[-1]

            training.step = stepped
            return training

        return wrap

    server = Loopback()
    aggregator = Aggregator(server, folder, configurator=configurator, rounds=6).start()
    devices = [
        Device(server, folder, n, workbench=workbench_of(n, made=made[n], wrap=timed(n))).start()
        for n in FOUR
    ]
    World(server, aggregator, devices).run_killed_at(kills)
    assert aggregator.starts > 5 or not kills
    return made


@pytest.mark.parametrize("configurator", ["caff", "fedadapter", "random-depth"])
def test_an_aggregator_that_is_killed_chooses_as_one_that_is_not(tmp_path, monkeypatch, configurator):
    for module in (caff, controls, fedadapter):
        monkeypatch.setattr(module, "num_layers_of", lambda settings: LAYERS)
    undisturbed = choices(tmp_path / "a", configurator)
    assert len({work.policy for works in undisturbed.values() for work in works}) > 1
    assert all(len(works) == 6 for works in undisturbed.values())
    assert choices(tmp_path / "b", configurator, kills=range(5, 4000, 3)) == undisturbed
