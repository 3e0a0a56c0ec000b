"""Jobs with differential privacy as they run: one noise for a version whatever is killed, figures, and a limit that holds."""

import itertools
import math

import numpy as np
import pytest
from fleet import FOUR, first_adapter, spoken, world
from safetensors.numpy import load

from fleetune.broker.jobs.privacy import Privacy
from fleetune.broker.methods.accounting import epsilon_of
from fleetune.broker.store.rows import rows
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.wire import Offer, UpdateReady
from fleetune.device_runtime.contracts.work import LocalWork

SIZE = 3000 + 1 + 6
MODES = ("central", "distributed", "local")


def private(name="central", **changes):
    return Privacy(**{"name": name, "clip": 0.01, "noise": 1.0, **changes})


def heard():
    """What a server carries, as (topic, payload) pairs, and what makes it be kept."""
    log = []
    return log, lambda topic, payload: log.append((topic, payload)) or (payload,)


def versions_told(log):
    """Digests of the adapters that devices were offered, by version."""
    told = {}
    for _, offer in spoken(log, Offer):
        told.setdefault(offer.version, set()).add(offer.adapter_sha256 or offer.adapter.sha256)
    return told


@pytest.mark.parametrize(("name", "share"), [("central", 1 / 4), ("distributed", 1 / 4), ("local", 2 / 4)])
def test_a_version_has_the_noise_of_its_mode(tmp_path, name, share):
    done = world(tmp_path, in_memory=True, rounds=1, dp=private(name, noise=50.0)).run()
    new, old = load(done.aggregator.version(1)), first_adapter()
    moved = np.concatenate([(new[n] - old[n]).ravel() for n in new])
    wanted = share * 50.0 * 0.01
    assert abs(moved.std() / wanted - 1) < 10 / math.sqrt(2 * SIZE) + 0.02
    assert np.all(new["never_trained"] != old["never_trained"]), "no tensor tells by its noise who sent it"


@pytest.mark.parametrize("name", MODES)
def test_the_history_says_what_is_spent_and_the_job_ends_before_it_is_too_much(tmp_path, name):
    notes = []
    done = world(tmp_path, rounds=9, dp=private(name, most_epsilon=9.0), on_note=notes.append).run()
    spent = [row.epsilon for row in done.aggregator.rows]
    assert spent == pytest.approx([0.0, 4.377178, 6.572970, 8.4], abs=0.1)
    assert spent[-1] <= 9.0
    assert done.aggregator.service.finished
    assert "with another, epsilon would exceed 9" in notes[-1]


def test_a_job_without_noise_has_no_epsilon(tmp_path):
    done = world(tmp_path, in_memory=True, rounds=1).run()
    assert [row.epsilon for row in done.aggregator.rows] == [None, None]


def test_a_restart_counts_on(tmp_path):
    dp = private(most_epsilon=9.0)
    calm = world(tmp_path / "calm", rounds=9, dp=dp).run()
    killed = world(tmp_path / "killed", rounds=9, dp=dp).run_killed_at(range(3, 200, 7))
    again = rows(killed.aggregator.ledger, spending=lambda turns: turns)
    assert [row.epsilon for row in again] == [0, 1, 2, 3]
    assert [row.epsilon for row in killed.aggregator.rows[-4:]] == [
        row.epsilon for row in calm.aggregator.rows
    ]


class Killed(BaseException):
    """A SIGKILL: nothing catches it."""


def kill_in(aggregator, monkeypatch, step):
    """Have the next version's making die at a step: before its files, after them, or when it is kept."""
    ledger = aggregator.ledger
    owner, name = (
        ledger._blobs,
        "write_version" if step != "kept" else "sweep",
    )  # which comes after the commit
    original = getattr(owner, name)

    def dying(*args, **options):
        if step != "before its files":
            original(*args, **options)
        monkeypatch.setattr(owner, name, original)
        raise Killed

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("step", ["before its files", "after its files", "kept"])
@pytest.mark.parametrize("name", ["central", "local"])
def test_nobody_sees_two_noises_of_one_version_wherever_the_aggregator_dies(
    tmp_path, monkeypatch, name, step
):
    log, disturb = heard()
    federation = world(tmp_path, rounds=3, dp=private(name), disturb=disturb)
    before = {}
    for number in (1, 2, 3):
        kill_in(federation.aggregator, monkeypatch, step)
        with pytest.raises(Killed):
            federation.run(until=lambda: False)
        if step == "kept":
            before[number] = federation.aggregator.version(number)
        federation.aggregator.kill()
        federation.aggregator.start(federation.now)
    federation.run()
    told = versions_told(log)
    assert told.keys() == {0, 1, 2}
    assert all(len(digests) == 1 for digests in told.values())
    assert all(federation.aggregator.version(n) == content for n, content in before.items())


def test_killed_before_every_turn_a_version_has_one_noise(tmp_path):
    log, disturb = heard()
    federation = world(tmp_path, rounds=3, dp=private("distributed"), disturb=disturb)
    federation.run_killed_at(range(2, 400))
    assert all(len(digests) == 1 for digests in versions_told(log).values())


def test_the_next_version_is_made_from_what_was_kept(tmp_path):
    done = world(tmp_path, rounds=2, dp=private()).run()
    held = done.aggregator.service._versions.reference(2)
    assert to_bytes(held) == done.aggregator.version(2)


def test_a_device_that_sends_more_than_it_may_is_bounded_again(tmp_path):
    federation = world(tmp_path, in_memory=True, rounds=1, dp=private(noise=1e-6))
    done = federation.run()
    new, old = load(done.aggregator.version(1)), first_adapter()
    norm = math.sqrt(sum(float(np.square(np.float64(new[n]) - old[n]).sum()) for n in new))
    assert 0 < norm <= 0.01 + 1e-4


@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_what_a_codec_owes_from_earlier_rounds_does_not_exceed_the_bound(tmp_path, codec):
    ratio = {"codec_ratio": 0.01} if codec == "topk" else {}
    work = LocalWork(steps=4, codec=codec, **ratio)
    done = world(tmp_path, rounds=3, work=work, dp=private(noise=1e-6)).run()
    found = [load(done.aggregator.version(n)) for n in range(4)]
    for old, new in itertools.pairwise(found):
        norm = math.sqrt(sum(float(np.square(np.float64(new[n]) - old[n]).sum()) for n in new))
        assert norm <= 0.01 + 1e-4


@pytest.mark.parametrize("name", MODES)
def test_figures_come_only_where_the_aggregator_is_trusted(tmp_path, name):
    log, disturb = heard()
    federation = world(tmp_path, in_memory=True, rounds=1, dp=private(name), disturb=disturb)
    federation.run()
    told = [update.stats for _, update in spoken(log, UpdateReady)]
    assert len(told) >= len(FOUR)
    assert all(bool(stats) == (name == "central") for stats in told)


def test_a_job_that_hides_samples_tells_what_is_spent_and_ends_at_its_limit(tmp_path):
    notes, (log, disturb) = [], heard()
    work = LocalWork(steps=4)
    dp = private("sample", sample_rate=0.5, noise=2.0, most_epsilon=7.0)
    done = world(tmp_path, rounds=9, work=work, dp=dp, on_note=notes.append, disturb=disturb).run()
    spent = [row.epsilon for row in done.aggregator.rows]
    assert spent == [epsilon_of(dp, rounds, work) for rounds in range(len(spent))]
    assert 3 <= len(spent) < 10
    assert spent[-1] <= 7.0 < epsilon_of(dp, len(spent), work)
    assert "with another, epsilon would exceed 7" in notes[-1]
    told = [(update.stats, update.num_samples) for _, update in spoken(log, UpdateReady)]
    assert told
    assert all(one == ({}, 1) for one in told)
