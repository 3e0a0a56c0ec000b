"""An update with noise of the device's own: how much, once for the same update whatever is killed, and nothing beside it."""

import math
import stat

import numpy as np
import pytest
from fleet import STEPS, first_adapter, workbench_of
from stage import Stage

from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.contracts.gaussian import NOISE_SECRET
from fleetune.device_runtime.contracts.wire import Decline, UpdateReady
from fleetune.device_runtime.contracts.work import CLASS_MEANS, LocalWork
from fleetune.device_runtime.terms.left import Record
from fleetune.device_runtime.terms.terms import Terms
from fleetune.device_runtime.terms.words import left_in_words

CLIP, NOISE = 0.001, 3.0


def work(**changes):
    return LocalWork(**{"steps": STEPS, "seed": 1, "most_norm": CLIP, "noise": NOISE, **changes})


def sent(stage, number=1, **changes):
    update = stage.trained(number, **changes)
    return update, decode_update(stage.pull(update), first_adapter())


def change(values):
    return np.concatenate([(value - first_adapter()[n]).ravel() for n, value in sorted(values.items())])


def lines(stage):
    return Record(stage.device.files).newest(99)


def test_noise_has_its_standard_deviation_in_every_tensor(tmp_path):
    _, values = sent(Stage(tmp_path, terms=Terms(least_effective=0)), work=work())
    moved = change(values)
    assert values.keys() == first_adapter().keys()
    assert abs(moved.std() / (CLIP * NOISE) - 1) < 10 / math.sqrt(2 * moved.size) + 0.01


def test_without_noise_the_change_is_bounded_at_every_owner_s(tmp_path):
    for folder, terms in (("with", Terms(least_effective=0)), ("without", None)):
        update, values = sent(Stage(tmp_path / folder, terms=terms), work=work(noise=0.0))
        assert np.linalg.norm(change(values)) == pytest.approx(CLIP, rel=0.02)
    assert update.stats["loss"] > 0


def test_a_bound_that_does_not_bind_leaves_every_bit(tmp_path):
    _, bounded = sent(
        Stage(tmp_path / "a", terms=Terms(least_effective=0)), work=work(noise=0.0, most_norm=1e6)
    )
    _, free = sent(Stage(tmp_path / "b", terms=Terms(least_effective=0)), work=LocalWork(steps=STEPS, seed=1))
    assert all(bounded[name].tobytes() == free[name].tobytes() for name in free)


def killed_after_packing(stage, monkeypatch):
    """Let a device pack and record its update, and die before the outbox has it."""
    deliveries = stage.device.agent._assignments._deliveries

    def dying(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(deliveries, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        stage.poll(STEPS + 4)
    stage.device.kill()
    monkeypatch.undo()
    stage.device.start()


def test_a_device_that_dies_with_its_update_packed_sends_the_same_noise_and_records_it_once(
    tmp_path, monkeypatch
):
    calm = Stage(tmp_path / "calm", terms=Terms(least_effective=0))
    calm.device.files.write(NOISE_SECRET, b"s" * 32)
    expected, _ = sent(calm, work=work())
    stage = Stage(tmp_path / "killed", terms=Terms(least_effective=0))
    stage.device.files.write(NOISE_SECRET, b"s" * 32)
    stage.aggregator.offer(1, work=work())
    killed_after_packing(stage, monkeypatch)
    (packed,) = lines(stage)
    stage.poll()
    update, _ = sent(stage, work=work())
    assert update.payload.sha256 == packed.digest == expected.payload.sha256
    assert len(lines(stage)) == 1


def test_what_was_refused_and_is_asked_for_again_has_the_same_noise(tmp_path):
    stage = Stage(tmp_path, terms=Terms(least_effective=0))
    update, first = sent(stage, work=work())
    stage.aggregator.verdict(update, accepted=False, reason="once more")
    stage.poll()
    stage.aggregator.status("two")
    stage.poll()
    again, second = sent(stage, work=work())
    assert again.payload.sha256 == update.payload.sha256
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("other", ["device", "round", "data"])
def test_any_other_update_has_other_noise(tmp_path, other):
    secret = {"device": b"t" * 32}.get(other, b"s" * 32)
    noises = []
    for name, key in (("a", b"s" * 32), ("b", secret)):
        number = 4 if (other, name) == ("data", "b") else 3
        stage = Stage(
            tmp_path / name, terms=Terms(least_samples=0, least_effective=0), workbench=workbench_of(number)
        )
        stage.device.files.write(NOISE_SECRET, key)
        at = 2 if (other, name) == ("round", "b") else 1
        noises.append(change(sent(stage, at, work=work(noise=1e3))[1]))
    assert abs(np.corrcoef(*noises)[0, 1]) < 10 / math.sqrt(noises[0].size)


def test_the_secret_is_its_owner_s_alone_and_no_two_devices_have_one(tmp_path):
    found = []
    for name in ("a", "b"):
        stage = Stage(tmp_path / name, terms=Terms(least_effective=0))
        sent(stage, work=work())
        path = stage.device.folder / NOISE_SECRET
        found.append(path.read_bytes())
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert len(found[-1]) == 32
    assert found[0] != found[1]


def test_no_figure_comes_beside_noise(tmp_path):
    update, _ = sent(Stage(tmp_path, terms=Terms(least_effective=0)), work=work(histogram=True))
    assert (update.stats, update.histogram) == ({}, [])


def test_an_owner_may_keep_figures_without_noise_too(tmp_path):
    update, _ = sent(
        Stage(tmp_path, terms=Terms(least_effective=0, tell_figures=False)), work=work(noise=0.0)
    )
    assert update.stats == {}


def test_the_record_says_under_which_noise_it_left(tmp_path):
    stage = Stage(tmp_path, terms=Terms(least_effective=0))
    sent(stage, work=work())
    (line,) = lines(stage)
    assert (line.most_norm, line.noise) == (CLIP, NOISE)
    assert "with noise of 3 times its largest norm 0.001" in left_in_words(line)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (work(noise=1.9), "least_noise: 1.9 asked for, 2 at least"),
        (work(noise=0.0), "least_noise: 0 asked for, 2 at least"),
        (work(learns=CLASS_MEANS), "least_noise: 0 asked for, 2 at least"),
        (work(most_norm=0.0), "noise is asked for without a norm"),
        (work(noise=math.nan), "noise must be"),
        (work(most_norm=math.inf), "most_norm must be"),
        (work(most_norm=-1.0), "most_norm must be at least 0"),
    ],
)
def test_less_noise_than_the_owner_asks_for_is_declined(tmp_path, asked, said):
    stage = Stage(tmp_path, terms=Terms(least_effective=0, least_noise=2.0))
    stage.aggregator.offer(1, work=asked)
    stage.poll(STEPS + 4)
    (decline,) = stage.aggregator.heard(Decline)
    assert said in decline.reason
    assert not stage.aggregator.heard(UpdateReady)


def test_noise_beyond_all_measure_is_declined(tmp_path):
    stage = Stage(tmp_path, terms=Terms(least_effective=0))
    stage.aggregator.offer(1, work=work(noise=1e300, most_norm=1e300))
    stage.poll(STEPS + 4)
    assert stage.aggregator.heard(Decline)
