"""Which devices may evaluate, and whose marks the operator forgives."""

import pytest
from fleet import settings_of

from fleetune.broker.aggregation import _pardon
from fleetune.broker.jobs.members import names_in
from fleetune.broker.rounds.quarantine import Quarantine
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.tasks import PARDONED, REFUSED, mark
from fleetune.device_runtime.errors import ConfigError


def test_names_come_from_the_line_or_from_a_file(tmp_path):
    assert names_in("") == ()
    assert names_in("a, b,a,") == ("a", "b")
    (tmp_path / "judges").write_text("kitchen\n\nhall\n")
    assert names_in(str(tmp_path / "judges")) == ("kitchen", "hall")


@pytest.mark.parametrize("said", ["a,b/c", "..", "a b"])
def test_a_name_that_no_device_can_have_is_refused(said):
    with pytest.raises(ConfigError, match="device"):
        names_in(said)


def test_a_pardon_is_kept_and_only_for_whom_something_is_noted(tmp_path):
    with Ledger(tmp_path, settings_of()) as ledger:
        for number in (1, 2, 3):
            assert ledger.mark(mark(number, "bad", REFUSED, "implausible\nupdate \x1b[2J"))
        assert not ledger.mark(mark(3, "bad", REFUSED))
        with pytest.raises(ConfigError, match="nothing is noted of device 'good'; of: bad"):
            _pardon(ledger, ["good"])
        assert Quarantine(3, ledger.marks()).until(5) == {"bad": 24}
        _pardon(ledger, ["bad"])
    with Ledger(tmp_path, settings_of()) as ledger:
        assert ledger.marks()[-1].kind == PARDONED
        assert Quarantine(3, ledger.past().marks).until(5) == {}
        assert all(one.detail.isprintable() for one in ledger.marks())


def test_strikes_may_differ_at_a_later_start_and_caps_may_not(tmp_path):
    with Ledger(tmp_path, settings_of()) as ledger:
        ledger.add_version(0, b"x", round_number=0)
    with Ledger(tmp_path, settings_of(strikes=0)):
        pass
    with pytest.raises(ConfigError, match=r"weight_cap: 5\.0, was 3\.0"):
        Ledger(tmp_path, settings_of(weight_cap=5.0))
