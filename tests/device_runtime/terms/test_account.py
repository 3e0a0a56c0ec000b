"""What a device's data has spent: against the library, once for the same work, kept whatever is killed, and its limit."""

import msgspec
import pytest

from fleetune.device_runtime.contracts.accounting import Steps, epsilon_of_steps, steps_of
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import DiskFiles, MemoryFiles
from fleetune.device_runtime.terms.account import FILE, Account

DELTA = 1e-5
ROUND = Steps(1.1, 0.01, 1000)


def spent(account, *, most=0.0, key="a", steps=ROUND):
    account.put_down(steps, key, most=most, delta=DELTA)
    return epsilon_of_steps(account.read().steps, DELTA)


def test_epsilon_is_the_library_s_own_in_a_known_case():
    import dp_accounting as library

    accountant = library.rdp.RdpAccountant()
    event = library.PoissonSampledDpEvent(0.01, library.GaussianDpEvent(1.1))
    accountant.compose(library.SelfComposedDpEvent(event, 10_000))
    found = epsilon_of_steps([Steps(1.1, 0.01, 10_000)], DELTA)
    assert found == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-12)
    assert found == pytest.approx(5.65, abs=0.02)
    parts = epsilon_of_steps([Steps(1.1, 0.01, 4_000), Steps(1.1, 0.01, 6_000)], DELTA)
    assert parts == pytest.approx(found, rel=1e-12)


def test_steps_of_other_kinds_compose():
    one, other = Steps(1.1, 0.01, 1000), Steps(2.0, 0.2, 50)
    both = epsilon_of_steps([one, other], DELTA)
    assert max(epsilon_of_steps([one], DELTA), epsilon_of_steps([other], DELTA)) < both
    assert both < epsilon_of_steps([one], DELTA) + epsilon_of_steps([other], DELTA)


@pytest.mark.parametrize(
    "kinds",
    [
        [Steps(1.1, 0.01, n) for n in (0, 1, 10, 1000, 10**6)],
        [Steps(1.1, q, 100) for q in (1e-6, 1e-3, 0.1, 0.5, 1.0)],
        [Steps(z, 0.1, 100) for z in (1e6, 10.0, 1.0, 0.5)],
    ],
)
def test_it_grows_with_steps_and_rate_and_falls_with_noise(kinds):
    found = [epsilon_of_steps([kind], DELTA) for kind in kinds]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_an_epoch_has_as_many_steps_as_take_each_sample_once():
    work = LocalWork(sample_clip=1.0, sample_noise=2.0, sample_rate=0.3, epochs=2)
    assert steps_of(work, rounds=3) == Steps(2.0, 0.3, 24)


def test_all_rounds_count_and_the_same_work_once(tmp_path):
    files = DiskFiles(tmp_path)
    one = spent(Account(files))
    assert spent(Account(files)) == one
    assert spent(Account(DiskFiles(tmp_path)), key="b") > one
    assert Account(files).read().steps == (Steps(1.1, 0.01, 2000),)


def test_the_limit_stops_and_nothing_is_put_down(tmp_path):
    account = Account(DiskFiles(tmp_path))
    first = spent(account, most=8.0)
    with pytest.raises(ConfigError, match=r"most_epsilon: .* would be spent, 2 at most"):
        account.put_down(ROUND, "b", most=2.0, delta=DELTA)
    assert epsilon_of_steps(Account(DiskFiles(tmp_path)).read().steps, DELTA) == first
    account.put_down(ROUND, "b", most=8.0, delta=DELTA)


def test_no_noise_to_speak_of_is_beyond_any_limit():
    with pytest.raises(ConfigError, match="most_epsilon"):
        spent(Account(MemoryFiles()), most=1e6, steps=Steps(1e-6, 0.5, 1))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"steps":[]}', b"nonsense"])
def test_a_damaged_account_is_never_an_empty_one(tmp_path, content):
    files = DiskFiles(tmp_path)
    files.write(FILE, content)
    with pytest.raises(
        ConfigError, match=r"spent\.json: damaged, and what this device's data has spent is not known"
    ):
        spent(Account(files))
    assert files.read(FILE) == content


def test_a_smaller_count_by_hand_is_noticed(tmp_path):
    files = DiskFiles(tmp_path)
    spent(Account(files))
    files.write(FILE, files.read(FILE).replace(b'"count":1000', b'"count":10'))
    with pytest.raises(ConfigError, match="damaged"):
        Account(files).read()


def test_devices_that_share_an_account_spend_of_one(tmp_path):
    shared = tmp_path / "account"
    one = spent(Account(MemoryFiles(), shared=shared))
    both = spent(Account(MemoryFiles(), shared=shared), key="of another job")
    assert both > one
    assert (shared / FILE).stat().st_mode & 0o077 == 0


def test_the_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'fleetune\[privacy\]'"):
        epsilon_of_steps([Steps(1.234567, 0.1, 1)], DELTA)


def test_the_file_says_all_there_is(tmp_path):
    files = DiskFiles(tmp_path)
    spent(Account(files))
    told = msgspec.json.decode(files.read(FILE))
    assert told["steps"] == [{"noise": 1.1, "rate": 0.01, "count": 1000}]
