"""Files of keys: what they hold, who may read them, and one line for each that will not do."""

import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from paths import ROOT

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network.signing import (
    Signer,
    Trust,
    Trusted,
    read_private,
    read_public,
    trusted_of,
    write_key_pair,
)


@pytest.fixture
def pair(tmp_path):
    write_key_pair(tmp_path / "aggregator.key", tmp_path / "aggregator.pub")
    return tmp_path / "aggregator.key", tmp_path / "aggregator.pub"


def private_pem(key, password=None):
    how = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, how)


def public_pem(key):
    return key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)


def test_a_pair_that_is_written_is_read_and_its_owners_alone(pair):
    private, public = pair
    assert private.stat().st_mode & 0o777 == 0o600
    assert private.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    (key,) = read_public(public)
    assert key == read_private(private).public_key()
    assert trusted_of(Trust(trust=str(public))).names == Signer(read_private(private), start=1).name


def test_a_pair_of_openssl_is_read(tmp_path):
    private, public = tmp_path / "key", tmp_path / "pub"
    for line in (f"genpkey -algorithm ed25519 -out {private}", f"pkey -in {private} -pubout -out {public}"):
        subprocess.run(["openssl", *line.split()], check=True, capture_output=True)
    assert read_public(public) == [read_private(private).public_key()]


@pytest.mark.parametrize("there", [0, 1])
def test_no_key_is_written_over(tmp_path, there):
    paths = tmp_path / "a.key", tmp_path / "a.pub"
    paths[there].write_text("mine")
    with pytest.raises(ConfigError, match="is there already; a key is not written over"):
        write_key_pair(*paths)
    assert [path.name for path in tmp_path.iterdir()] == [paths[there].name]
    assert paths[there].read_text() == "mine"


def test_a_file_may_hold_several_keys_with_words_between(tmp_path):
    keys = [ed25519.Ed25519PrivateKey.generate() for _ in range(3)]
    path = tmp_path / "trusted"
    path.write_bytes(b"of 2027\n" + b"\nthe next\n".join(map(public_pem, keys)))
    assert read_public(path) == [key.public_key() for key in keys]
    assert len(Trusted(read_public(path)).names.split(", ")) == 3


ED, RSA = ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 1024)
CUT = public_pem(ED).replace(b"MCow", b"MCo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a key: No such file"),
        (b"", "no private key in PEM; openssl genpkey"),
        (b"\xff" * 100, "no private key in PEM"),
        (public_pem(ED), "no private key in PEM"),
        (private_pem(ED)[:80], "no private key in PEM"),
        (private_pem(RSA), "a key of another sort, RSAPrivateKey; expected Ed25519PrivateKey"),
        (private_pem(ED, b"secret"), "the key is encrypted; give it without a password"),
        (b"x" * 70_000, "more than 65536 bytes"),
    ],
    ids=["no file", "empty", "no text", "public", "cut", "RSA", "with a password", "long"],
)
def test_a_private_key_that_will_not_do_is_one_line(tmp_path, content, message):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=message) as found:
        read_private(path)
    assert "\n" not in str(found.value)
    assert str(found.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a key: No such file"),
        (b"", "no public key in PEM"),
        (b"ssh-ed25519 AAAA", "no public key in PEM"),
        (private_pem(ED), "holds a private key; expected public keys alone"),
        (public_pem(ED) + private_pem(ED), "holds a private key"),
        (CUT, "a public key in it is damaged"),
        (public_pem(RSA), "a key of another sort, RSAPublicKey; expected Ed25519PublicKey"),
        (b"-----BEGIN " * 6000, "more than 65536 bytes|no public key"),
    ],
)
def test_a_file_of_public_keys_that_will_not_do_is_one_line(tmp_path, content, message):
    path = tmp_path / "trusted"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as found:
        read_public(path)
    assert "\n" not in str(found.value)


def test_a_key_that_others_may_read_is_refused(pair):
    os.chmod(pair[0], 0o604)
    with pytest.raises(ConfigError, match=r"other users of this machine may use this key: chmod 600 .*key"):
        read_private(pair[0])


def test_without_the_library_one_line_says_which_extra(monkeypatch, pair):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(
        ConfigError, match=r"a signed job needs cryptography; run: pip install 'fleetune\[trust\]'"
    ):
        read_public(pair[1])


def test_nothing_loads_cryptography_unless_a_key_is_given():
    code = "\n".join(
        [
            "import sys",
            "import fleetune.broker.aggregation, fleetune.device_runtime.commands.device",
            "from fleetune.device_runtime.network.signing import Trust, trusted_of",
            "assert trusted_of(Trust()) is None",
            "assert not [name for name in sys.modules if name.startswith('cryptography')]",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
