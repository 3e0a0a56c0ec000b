"""A device's own key and request: made once, told again, never overwritten."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fleetune.device_runtime.commands.enrol import enrol
from fleetune.device_runtime.errors import ConfigError, StateError


def test_again_it_says_what_is_there_and_changes_nothing(tmp_path):
    first = enrol("kitchen", out=tmp_path / "own")
    before = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    again = enrol("kitchen", out=tmp_path / "own")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    assert sorted(before) == ["kitchen.csr", "kitchen.key"]
    assert (first.is_new, again.is_new, again.is_signed) == (True, False, False)
    request = x509.load_pem_x509_csr(before["kitchen.csr"])
    key = serialization.load_pem_private_key(before["kitchen.key"], None)
    assert (request.subject.rfc4514_string(), request.is_signature_valid) == ("CN=kitchen", True)
    assert request.public_key() == key.public_key()


def test_a_request_that_was_lost_is_made_again_of_the_same_key(tmp_path):
    made = enrol("kitchen", out=tmp_path)
    key = Path(made.key).read_bytes()
    Path(made.request).unlink()
    assert not enrol("kitchen", out=tmp_path).is_new
    assert Path(made.key).read_bytes() == key
    assert Path(made.request).exists()


def test_what_does_not_belong_together_is_told_without_a_word_of_the_key(tmp_path):
    made, other = enrol("kitchen", out=tmp_path), enrol("kitchen", out=tmp_path / "other")
    Path(made.request).write_bytes(Path(other.request).read_bytes())
    with pytest.raises(StateError, match=r"kitchen.csr: damaged, or not of the key"):
        enrol("kitchen", out=tmp_path)
    key = Path(made.key).read_text()
    Path(made.key).write_text(key.replace("A", "B"))
    with pytest.raises(StateError, match=r"kitchen.key: not a private key in PEM") as told:
        enrol("kitchen", out=tmp_path)
    assert key.splitlines()[1][:16] not in str(told.value)
    Path(made.key).unlink()
    with pytest.raises(StateError, match=r"kitchen.csr is here without its key"):
        enrol("kitchen", out=tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "x" * 65, "a b", "+", "ä"])
def test_a_name_that_no_device_can_have_makes_nothing(tmp_path, name):
    with pytest.raises(ConfigError, match="use 1 to 64 letters"):
        enrol(name, out=tmp_path / "own")
    assert not (tmp_path / "own").exists()
