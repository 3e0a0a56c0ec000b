"""Traffic planners in whole jobs: every device packed in its own way, the same after kills, and liars contained."""

from itertools import pairwise

import numpy as np
import pytest
from fleet import FOUR, Aggregator, Device, World, spoken, workbench_of
from stranger import Stranger, good_payload

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.methods.traffic import TRAFFIC
from fleetune.broker.service.choices import choices, replay
from fleetune.device_runtime.arrays import parse_arrays
from fleetune.device_runtime.contracts.wire import Offer, UpdateReady
from fleetune.device_runtime.contracts.work import FULL, LocalWork
from fleetune.device_runtime.network.loopback import Loopback

SIZES = {"num_elements": 3007, "num_classes": 3}
CHOOSING = [name for name in TRAFFIC if name != "fixed"]


def told(number):
    """Another number of each class on every device."""
    return [number + 1, 2 * number, 5]


def played(folder, traffic, *, kills=(), rounds=5, patience=None, tells=True, asks=True, **changes):
    """A job with this planner, its aggregator killed at these turns."""
    work = LocalWork(steps=4, histogram=asks and TRAFFIC[traffic]().hears_labels)
    log = []
    server = Loopback(disturb=lambda topic, payload: (log.append((topic, payload)), (payload,))[1])
    changes = {"traffic": traffic, "rounds": rounds, "work": work, **SIZES, **changes}
    aggregator = Aggregator(server, folder, patience=patience, **changes).start()
    devices = [
        Device(
            server,
            folder,
            n,
            workbench=workbench_of(n)._replace(**({"histogram": lambda n=n: told(n)} if tells else {})),
        ).start()
        for n in FOUR
    ]
    playing = World(server, aggregator, devices).run_killed_at(kills)
    playing.log = log
    assert aggregator.starts > 3 or not kills
    return playing


def plans(playing):
    return [(d.task.device_id, d.task.work, d.task.plan) for d in playing.aggregator.ledger.decided()]


@pytest.mark.parametrize("traffic", CHOOSING)
def test_an_aggregator_that_is_killed_plans_as_one_that_is_not_and_as_its_ledger_says(tmp_path, traffic):
    undisturbed = played(tmp_path / "a", traffic)
    killed = played(tmp_path / "b", traffic, kills=range(7, 4000, 11))
    assert plans(killed) == plans(undisturbed)
    ledger = killed.aggregator.ledger
    again = list(replay(ledger, killed.aggregator.settings))
    assert len(again) == 20
    assert all(task == chosen for task, chosen in again)
    if traffic not in ("bits", "prowd-like", "caesar-uniform"):
        assert len({work.codec_ratio for _, work, _ in plans(killed)}) == 4, "one for each rank"


@pytest.mark.parametrize("traffic", CHOOSING)
def test_a_mask_cuts_what_a_planner_packs_and_a_kill_changes_no_plan(tmp_path, traffic):
    """Rounds 1 and 5 vote; what the others change is at most the mask's share."""
    job = {"work": LocalWork(steps=4, mask="consensus"), "mask_share": 0.1, "mask_every": 4, "rounds": 6}
    undisturbed = played(tmp_path / "a", traffic, **job)
    killed = played(tmp_path / "b", traffic, kills=range(7, 4000, 11), **job)
    assert plans(killed) == plans(undisturbed)
    found = [parse_arrays(undisturbed.aggregator.version(number)) for number in range(7)]
    moved = [sum(np.count_nonzero(a[n] != b[n]) for n in a) for a, b in pairwise(found)]
    assert [0 < count <= 301 for count in moved] == [number not in (1, 5) for number in range(1, 7)]


def test_the_histogram_is_told_once_is_in_the_ledger_and_never_without_leave(tmp_path):
    playing = played(tmp_path / "a", "caesar")
    ledger = playing.aggregator.ledger
    heard = [(o.device_id, o.round, list(o.noted.histogram)) for o in ledger.outcomes() if o.noted.histogram]
    assert sorted(heard) == [(f"device-{n}", 1, told(n)) for n in FOUR]
    asked = [d.task for d in ledger.decided() if d.task.work.histogram]
    assert {t.round for t in asked} == {1}
    for how in ({"tells": False}, {"asks": False}):
        job = played(tmp_path / str(how), "caesar", **how)
        quiet = job.aggregator.ledger
        assert not any(o.noted.histogram for o in quiet.outcomes())
        assert not any(m.histogram for _, m in spoken(job.log, UpdateReady)), "nothing on the wire either"
        assert max(d.task.round * d.task.work.histogram for d in quiet.decided()) <= 1, "asked once"


def test_devices_of_one_round_are_sent_and_send_in_ways_of_their_own(tmp_path):
    """Two of four in a round: who was away longer is sent more."""
    playing = played(
        tmp_path,
        "caesar",
        rounds=12,
        clients=2,
        min_clients=2,
        patience=Patience(gather_s=1),
        seed=4,
    )
    decided = [d.task for d in playing.aggregator.ledger.decided()]
    last = {}
    differing = 0
    for number in range(1, 13):
        asked = [t for t in decided if t.round == number]
        for task in asked:
            away = number - last.get(task.device_id, 0)
            ratio = task.plan.down.ratio if task.plan.down.codec != FULL else 1.0
            expected = 1 - 0.6 * (1 - away / number)
            assert ratio == pytest.approx(expected)
            last[task.device_id] = number
        differing += len({(t.work.codec_ratio, t.plan.down) for t in asked}) > 1
    assert differing > 6
    assert [c.reason for c in choices(playing.aggregator.ledger)][-1].endswith("up")


def test_a_device_that_is_back_after_50_rounds_gets_a_difference_from_what_it_holds(tmp_path):
    """Its adapter is a replica that nobody else has; the aggregator kept it."""
    log = []

    def tap(topic, payload):
        log.append((topic, payload))
        return (payload,)

    server = Loopback(disturb=tap)
    aggregator = Aggregator(
        server, tmp_path, traffic="caesar", rounds=60, clients=2, min_clients=1, size=40, **SIZES
    ).start()
    devices = [Device(server, tmp_path, n, size=40).start() for n in (0, 1)]
    playing = World(server, aggregator, devices)
    playing.run(until=lambda: aggregator.service.federation.version == 5)
    devices[1].kill()
    playing.run(until=lambda: aggregator.service.federation.version == 55)
    devices[1].start()
    log.clear()
    playing.run()
    offers = [
        m
        for topic, m in spoken(log, Offer)
        if "device-1" in topic and m.role == "train" and m.down_codec != FULL
    ]
    assert offers
    first = offers[0]
    assert (bool(first.reference), first.is_exact) == (True, False)
    assert first.down_ratio == pytest.approx(1 - 0.6 * (1 - (first.round - 5) / first.round), abs=0.02)
    assert "accepted" in devices[1].kinds()[-3:]


@pytest.mark.parametrize(
    ("histogram", "said"),
    [
        ([1, 2], "its histogram has 2 classes; this job has 3"),
        ([1, -2, 3], "its histogram counts -2 samples"),
        ([2**40, 0, 0], "its histogram counts 1099511627776 samples"),
    ],
)
def test_a_histogram_that_cannot_be_is_refused_and_the_round_goes_on(tmp_path, histogram, said):
    work = LocalWork(steps=4, histogram=True)
    stranger = Stranger(tmp_path, traffic="caesar", work=work, **SIZES)
    stranger.hello()
    (offer,) = stranger.heard(Offer)
    how = {"codec": offer.work.codec, "task_id": offer.task_id}
    stranger.say(stranger.ready(good_payload(), histogram=histogram, **how))
    verdicts = stranger.deliver(good_payload(), histogram=histogram, **how)
    assert said in verdicts[0].reason
    ledger = stranger.aggregator.ledger
    assert list(ledger.outcomes()) == []
    assert not stranger.aggregator.service.finished


def test_the_deadline_that_a_planner_went_by_is_recorded(tmp_path):
    playing = played(tmp_path, "bits", rounds=2, patience=Patience(deadline_s=50))
    assert {plan.deadline_s for _, _, plan in plans(playing)} == {50.0}
    assert [plan.together for _, _, plan in plans(playing)] == [0] * 8
