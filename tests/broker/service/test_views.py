from rounds_by_hand import decline, federation, give, hello, report

from fleetune.broker.service.views import DeviceView, view_of
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.store.store import Cost


def seen(machine):
    return {v.device_id: (v.standing, v.is_here, v.paused) for v in view_of(machine, MemoryStore()).devices}


def test_every_device_is_shown_where_it_stands():
    machine = federation(clients=3, min_clients=2)
    for name in "abc":
        machine.hello(hello(name), 0.0)
    machine.hello(hello("d"), 0.0)
    machine.hello(hello("e", role="evaluate"), 0.0)
    give(machine, "a", 1)
    machine.declined(decline("b", 1), 1.0)
    machine.paused("c", "battery at 9 %")
    machine.offline("c", 1.0)
    assert seen(machine) == {
        "a": ("accepted", True, ""),
        "b": ("refused", True, ""),
        "c": ("pending", False, "battery at 9 %"),
        "d": ("idle", True, ""),
        "e": ("evaluating", True, ""),
    }
    machine.reported(report("e", 0), 2.0)
    assert seen(machine)["e"] == ("idle", True, "")


def test_the_job_is_shown_with_its_tasks_rows_and_costs():
    machine, store = federation(), MemoryStore()
    store.add_version(0, b"zero", round_number=0)
    store.spend(1, Cost(bytes_up=7))
    machine.hello(hello("a"), 0.0)
    machine.hello(hello("b"), 0.0)
    view = view_of(machine, store)
    assert (view.job, view.round, view.rounds, view.version) == ("j", 1, 2, 0)
    assert (view.is_open, view.finished, view.cost.bytes_up) == (True, False, 7)
    assert [row.round for row in view.rows] == [0]
    assert view.devices[0] == DeviceView(
        device_id="a", role="train", is_here=True, standing="pending", task_id="train-1-a"
    )
