"""An authority: what it signs, what it refuses, that it revokes, and that no kill leaves it in two minds."""

import contextlib
import os
import random
import signal
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import children
import pytest
from certificates import Authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from paths import ROOT

from fleetune.broker.authority import authority as house
from fleetune.broker.authority.authority import PASSWORD, aggregator, init, listed, revoke, server, sign
from fleetune.broker.authority.certificates import numbers_of
from fleetune.device_runtime.commands.enrol import enrol
from fleetune.device_runtime.errors import ConfigError, StateError


@pytest.fixture
def folder(tmp_path):
    return init(tmp_path / "authority", hosts=["server.local", "10.0.0.2", "::1"])


@pytest.fixture
def request_of(tmp_path):
    """Enrol a device, another key for each ``place``; the request's path."""
    return lambda name, place="own": Path(enrol(name, out=tmp_path / place).request)


def loaded(path):
    return x509.load_pem_x509_certificate(Path(path).read_bytes())


def revoked_serials(folder):
    mark = b"-----BEGIN X509 CRL-----"
    parts = (folder / "revoked.pem").read_bytes().split(mark)[1:]
    return {f"{row.serial_number:x}" for part in parts for row in x509.load_pem_x509_crl(mark + part)}


def states(folder):
    return {(row.name, row.serial): row.state for row in listed(folder) if row.kind == "device"}


def openssl(*words):
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_it_makes_openssl_takes_and_only_for_its_purpose(folder, request_of, tmp_path):
    made = sign(folder, request=request_of("kitchen"))
    device = Path(made.folder) / "kitchen.crt"
    assert openssl("verify", "-purpose", "sslclient", "-CAfile", folder / "ca.crt", device)[0] == 0
    assert openssl("verify", "-purpose", "sslserver", "-CAfile", folder / "ca.crt", device)[0] != 0
    shown = (folder / "ca.crt", folder / "server.crt")
    for name in ("server.local", "10.0.0.2", "::1"):
        option = "-verify_hostname" if "local" in name else "-verify_ip"
        assert openssl("verify", "-purpose", "sslserver", option, name, "-CAfile", shown[0], shown[1])[0] == 0
    assert openssl("verify", "-purpose", "sslclient", "-CAfile", *shown)[0] != 0
    assert openssl("verify", "-CAfile", folder / "operators.crt", folder / "aggregator.crt")[0] == 0
    assert openssl("verify", "-CAfile", folder / "ca.crt", folder / "aggregator.crt")[0] != 0
    assert sorted(p.name for p in device.parent.iterdir()) == ["ca.crt", "kitchen.crt", "signing.pub"]


def test_the_pair_that_signs_jobs_is_ed25519_in_its_standard_forms(folder):
    key = serialization.load_pem_private_key((folder / "signing.key").read_bytes(), None)
    public = serialization.load_pem_public_key((folder / "signing.pub").read_bytes())
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    public.verify(key.sign(b"words"), b"words")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_no_umask_opens_a_key(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = init(tmp_path / "authority", hosts=["server"])
        enrol("kitchen", out=tmp_path / "own")
    finally:
        os.umask(before)
    private = [*folder.glob("*.key"), folder / "authority.sqlite", tmp_path / "own" / "kitchen.key"]
    assert len(private) == 7
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700


def test_the_same_request_again_gives_the_same_certificate(folder, request_of):
    first, again = (sign(folder, request=request_of("kitchen")) for _ in range(2))
    assert (first.is_new, again.is_new, first.serial) == (True, False, again.serial)
    renewed = sign(folder, request=request_of("kitchen"), renew=True)
    assert states(folder) == {("kitchen", first.serial): "replaced", ("kitchen", renewed.serial): "valid"}
    assert f"{loaded(Path(renewed.folder) / 'kitchen.crt').serial_number:x}" == renewed.serial


def test_a_name_that_is_taken_goes_to_no_other_key_unasked(folder, request_of):
    sign(folder, request=request_of("kitchen"))
    with pytest.raises(ConfigError, match=r"kitchen: it has a certificate of another key, valid, until .*; --renew"):  # fmt: skip
        sign(folder, request=request_of("kitchen", "thief"))
    assert sign(folder, request=request_of("kitchen", "thief"), renew=True).is_new


def test_a_key_serves_one_name_and_none_once_it_was_revoked(folder, request_of, tmp_path):
    request = request_of("kitchen")
    sign(folder, request=request)
    key = serialization.load_pem_private_key((tmp_path / "own" / "kitchen.key").read_bytes(), None)
    other = write_request(tmp_path / "hall.csr", "hall", key)
    with pytest.raises(ConfigError, match="hall: the key is that of 'kitchen'; every device makes its own"):
        sign(folder, request=other)
    revoke(folder, name="kitchen")
    for again in (False, True):
        with pytest.raises(ConfigError, match="kitchen: a certificate of this key was revoked; make a new key"):  # fmt: skip
            sign(folder, request=request, renew=again)
    with pytest.raises(ConfigError, match="another key, revoked, until"):
        sign(folder, request=request_of("kitchen", "new"))
    assert sign(folder, request=request_of("kitchen", "new"), renew=True).is_new


def write_request(path, name, key, *, extra=()):
    names = [x509.NameAttribute(NameOID.COMMON_NAME, one) for one in (name, *extra)]
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    path.write_bytes(request.sign(key, algorithm).public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aggregator", "the name 'aggregator' is the aggregator's"),
        ("fleetune-aggregator-home", "'fleetune-aggregator-home' is the aggregator's"),
        ("a/b", "device 'a/b': use 1 to 64 letters"),
        ("+", r"device '\+': use 1 to 64"),
        ("x\n2026 forged", r"device 'x\\n2026 forged': use 1 to 64"),
    ],
)
def test_names_that_no_device_may_have_are_refused(folder, tmp_path, name, said):
    request = write_request(tmp_path / "r.csr", name, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConfigError, match=said):
        sign(folder, request=request)
    assert not states(folder)


def test_requests_that_are_none_or_weak_are_refused(folder, request_of, tmp_path):
    good, path = request_of("kitchen").read_bytes(), tmp_path / "r.csr"
    of_another = write_request(path, "kitchen", ec.generate_private_key(ec.SECP256R1())).read_bytes()
    lines, stranger = good.splitlines(), of_another.splitlines()
    signature_of_another = b"\n".join([*lines[:-2], stranger[-2], lines[-1]])
    for content in (b"", b"words", good[:-60], (Path(request_of("x")).parent / "x.key").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"r.csr: not a certificate request in PEM, or a damaged one"):
            sign(folder, request=path)
    path.write_bytes(signature_of_another)
    with pytest.raises(ConfigError, match=r"r.csr: (its signature is not|not a certificate request)"):
        sign(folder, request=path)
    path.write_bytes(good + b" " * 70_000)
    with pytest.raises(ConfigError, match="longer than 65536 bytes"):
        sign(folder, request=path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        sign(folder, request=tmp_path / "nowhere")
    strong = ec.generate_private_key(ec.SECP256R1())
    for key, extra, said in (
        (rsa.generate_private_key(65537, 1024), (), "its key must be ECDSA on P-256"),
        (ed25519.Ed25519PrivateKey.generate(), (), "its key must be ECDSA on P-256"),
        (strong, ("hall",), "2 common names"),
    ):
        write_request(path, "kitchen", key, extra=extra)
        with pytest.raises(ConfigError, match=said):
            sign(folder, request=path)
    assert not states(folder)


def test_a_forged_signature_is_refused(folder, request_of, tmp_path):
    request = x509.load_pem_x509_csr(request_of("kitchen").read_bytes())
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    place = der.index(b"kitchen")
    der[place : place + 7] = b"kitchem"
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "forged.csr").write_bytes(forged)
    with pytest.raises(ConfigError, match=r"forged.csr: its signature is not that of its own key"):
        sign(folder, request=tmp_path / "forged.csr")


def test_what_is_asked_wrongly_is_told(folder, tmp_path, request_of):
    for wrong, said in (
        (lambda: init(folder), "not empty; an authority wants a folder of its own"),
        (lambda: init(tmp_path / "b", hosts=["a b"]), "--host 'a b': expected a DNS name or an IP address"),
        (lambda: init(tmp_path / "b", name="\x1b[31m"), "--name .*expected 1 to 40 printable"),
        (lambda: init(tmp_path / "b", days=0), "--days 0: expected 1 to 3650"),
        (lambda: sign(folder, request=request_of("kitchen"), days=10**300), "--days 1000.*expected 1 to"),
        (lambda: server(folder, hosts=[]), "a server needs a name: give --host"),
        (lambda: listed(tmp_path), f"{tmp_path}: no authority here; fleetune authority init"),
        (lambda: revoke(folder, name="hall"), "no certificate of 'hall'; have: aggregator"),
    ):
        with pytest.raises(ConfigError, match=said):
            wrong()
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.glob(".*.part"))


def test_a_revocation_is_in_the_list_at_once_and_each_list_is_later_than_the_one_before(folder, request_of):
    before = x509.load_pem_x509_crl((folder / "revoked.pem").read_bytes()) if listed(folder) else None
    kitchen = sign(folder, request=request_of("kitchen"))
    hall = sign(folder, request=request_of("hall"))
    assert revoke(folder, name="kitchen").serials == [kitchen.serial]
    assert revoke(folder, name="kitchen").serials == []
    assert revoked_serials(folder) == {kitchen.serial}
    lists = [before, x509.load_pem_x509_crl((folder / "revoked.pem").read_bytes())]
    revoke(folder, name="hall")
    lists.append(x509.load_pem_x509_crl((folder / "revoked.pem").read_bytes()))
    assert lists[0].last_update_utc < lists[1].last_update_utc < lists[2].last_update_utc
    assert lists[2].last_update_utc < house.now() - timedelta(minutes=50), "servers whose clocks are behind"
    assert revoked_serials(folder) == {kitchen.serial, hall.serial}
    assert set(states(folder).values()) == {"revoked"}


def test_what_a_newer_one_replaces_can_be_revoked_alone(folder, request_of):
    first = sign(folder, request=request_of("kitchen"))
    second = sign(folder, request=request_of("kitchen", "new"), renew=True)
    assert revoke(folder, name="kitchen", replaced=True).serials == [first.serial]
    assert states(folder) == {("kitchen", first.serial): "revoked", ("kitchen", second.serial): "valid"}


def test_an_aggregator_that_was_revoked_gets_a_new_key(folder):
    old = (folder / "aggregator.key").read_bytes()
    aggregator(folder)
    assert (folder / "aggregator.key").read_bytes() == old
    assert len(revoke(folder, name="aggregator").serials) == 2
    aggregator(folder)
    assert (folder / "aggregator.key").read_bytes() != old
    key = serialization.load_pem_private_key((folder / "aggregator.key").read_bytes(), None)
    assert loaded(folder / "aggregator.crt").public_key() == key.public_key()


def test_a_servers_key_stays_when_it_is_renewed(folder):
    old = (folder / "server.key").read_bytes()
    server(folder, hosts=["elsewhere"])
    assert (folder / "server.key").read_bytes() == old
    assert loaded(folder / "server.crt").subject.rfc4514_string() == "CN=elsewhere"


def test_nothing_outlives_the_authority(tmp_path, request_of):
    folder = init(tmp_path / "short", days=3)
    made = sign(folder, request=request_of("kitchen"), days=300)
    ends = loaded(folder / "ca.crt").not_valid_after_utc
    assert loaded(Path(made.folder) / "kitchen.crt").not_valid_after_utc == ends


def test_keys_that_sign_are_encrypted_where_a_password_is_set(tmp_path, request_of, monkeypatch):
    monkeypatch.setenv(PASSWORD, "open sesame")
    folder = init(tmp_path / "locked")
    for name in ("ca.key", "operators.key"):
        assert b"ENCRYPTED" in (folder / name).read_bytes()
    sign(folder, request=request_of("kitchen"))
    monkeypatch.setenv(PASSWORD, "wrong word")
    with pytest.raises(StateError, match=r"ca.key: not a private key in PEM, or its password is wrong") as wrong:  # fmt: skip
        sign(folder, request=request_of("hall"))
    assert "wrong word" not in str(wrong.value)
    monkeypatch.delenv(PASSWORD)
    with pytest.raises(ConfigError, match=f"ca.key: encrypted; its password belongs into {PASSWORD}"):
        sign(folder, request=request_of("hall"))


@pytest.mark.parametrize("name", ["ca.crt", "ca.key", "authority.sqlite"])
def test_a_damaged_folder_is_told_without_a_word_of_a_key(folder, request_of, name):
    secret = (folder / "ca.key").read_text().splitlines()[1]
    (folder / name).write_bytes(secret.encode() * 40)
    with pytest.raises(StateError, match=name) as told:
        sign(folder, request=request_of("kitchen"))
    assert secret[:20] not in str(told.value)


def test_a_list_that_was_lost_or_damaged_is_written_again(folder, request_of):
    made = sign(folder, request=request_of("kitchen"))
    revoke(folder, name="kitchen")
    for spoil in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:300])):
        spoil(folder / "revoked.pem")
        listed(folder)
        assert revoked_serials(folder) == {made.serial}


@pytest.mark.parametrize("fatal", range(2))
def test_a_revocation_that_is_cut_off_is_whole_or_not_there(folder, request_of, monkeypatch, fatal):
    """Cut off at each write; the next command brings the list up to date."""
    made, calls = sign(folder, request=request_of("kitchen")), []

    def cut(*arguments, **options):
        calls.append(1)
        if len(calls) > fatal:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    real = house.write_atomically
    monkeypatch.setattr(house, "write_atomically", cut)
    with contextlib.suppress(KeyboardInterrupt):
        revoke(folder, name="kitchen")
    monkeypatch.undo()
    is_revoked = states(folder)["kitchen", made.serial] == "revoked"
    assert is_revoked, "the index is changed before the list is written"
    assert revoked_serials(folder) == {made.serial}


def test_an_authority_that_is_cut_off_while_it_is_made_is_not_there(tmp_path, monkeypatch):
    real = house.write_atomically
    for fatal in range(6):
        left = [fatal]

        def cut(*arguments, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(house, "write_atomically", cut)
        with pytest.raises(KeyboardInterrupt):
            init(tmp_path / "authority", hosts=["server"])
        monkeypatch.undo()
        assert not (tmp_path / "authority").exists()
    assert (init(tmp_path / "authority") / "ca.crt").is_file()


_WORKER = """
import sys
from fleetune.broker.authority.authority import revoke, sign
from fleetune.device_runtime.commands.enrol import enrol
folder, own, begin = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(begin, begin + 10_000):
    name = f"d{number}"
    print("signed", name, sign(folder, request=enrol(name, out=own).request).serial, flush=True)
    if number % 2:
        print("revoked", name, revoke(folder, name=name).serials[0], flush=True)
"""


def test_no_sigkill_loses_a_revocation_or_gives_a_serial_number_twice(folder, tmp_path):
    """What was told is so afterwards; kills at random moments, two processes at a time on one authority."""
    draws, signed, revoked = random.Random(13), {}, {}
    for start in range(6):
        words = [
            [sys.executable, "-c", _WORKER, str(folder), str(tmp_path / "own"), str(100_000 * start + 50_000 * n)]
            for n in range(2)
        ]  # fmt: skip
        workers = [children.start(w, stdout=subprocess.PIPE, text=True, cwd=ROOT) for w in words]
        said = [worker.stdout.readline() for worker in workers]
        time.sleep(draws.uniform(0.0, 0.25))  # a random moment of its work is what is tested
        for worker, first in zip(workers, said, strict=True):
            worker.send_signal(signal.SIGKILL)
            for line in (first + worker.stdout.read()).splitlines(keepends=True):
                if line.endswith("\n"):
                    kind, name, serial = line.split()
                    (signed if kind == "signed" else revoked)[name] = serial
            worker.wait(10)
            worker.stdout.close()
    rows = [row for row in listed(folder) if row.kind == "device"]
    by_name = {row.name: row for row in rows}
    assert len(revoked) > 5
    assert len({row.serial for row in listed(folder)}) == len(listed(folder))
    assert len(by_name) == len(rows), "a name got two certificates"
    assert {name: by_name[name].serial for name in signed} == signed
    assert {by_name[name].state for name in revoked} == {"revoked"}
    in_index = {row.serial for row in rows if row.state == "revoked"}
    assert revoked_serials(folder) == in_index >= set(revoked.values())
    numbers = numbers_of((folder / "revoked.pem").read_bytes())
    assert numbers == [len(in_index) + 1] * 2


def test_an_authority_of_openssl_is_no_folder_of_ours(tmp_path):
    made = Authority(tmp_path / "other")
    with pytest.raises(ConfigError, match="no authority here"):
        listed(Path(made.cert).parent)
