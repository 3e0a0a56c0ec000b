"""Certificates that vouch for keys of masks, in JavaScript: taken, and refused with the same words, where Python does."""

import json
import random
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from node_web import NODE, WEB, needs_web, run

from fleetune.broker.authority.authority import init, sign
from fleetune.device_runtime.commands.enrol import enrol
from fleetune.device_runtime.contracts.mask_messages import MaskGroup, MaskPeer
from fleetune.device_runtime.contracts.secure_sums.keys import Scope, new_secret, public_of
from fleetune.device_runtime.contracts.secure_sums.vouching import (
    Authorities,
    Voucher,
    open_authorities,
    open_voucher,
    problem_of_peer,
)
from fleetune.device_runtime.contracts.wire import decode, encode
from fleetune.device_runtime.network.keys import common_name

pytestmark = [
    needs_web,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of numbers and names that a stranger chose
]
SCOPE, KEYS = Scope("words", "1-0"), (bytes(range(32)), bytes(range(1, 33)))
NOW = datetime.now(timezone.utc).replace(microsecond=0)
PEM = serialization.Encoding.PEM
KINDS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


class Own(NamedTuple):
    """A certificate and its key."""

    certificate: bytes
    """PEM."""
    key: bytes
    """PKCS8, PEM."""


class Case(NamedTuple):
    """Keys of a device as they are told, and whose signature of its certificate counts."""

    device_id: str
    certificate: bytes
    """DER."""
    signature: bytes
    authority: int = 0


def made(
    name, key, issuer_name, issuer_key, *, digest=None, purposes=(), begins=None, ends=NOW + timedelta(days=9)
):
    """A certificate of any kind, PEM; its own where there is no issuer."""
    builder = x509.CertificateBuilder(
        subject_name=common_name(name) if isinstance(name, str) else name,
        issuer_name=common_name(issuer_name),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=begins or min(NOW, ends) - timedelta(days=2),
        not_valid_after=ends,
    )
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    is_plain = isinstance(issuer_key, ed25519.Ed25519PrivateKey)
    return builder.sign(issuer_key, None if is_plain else digest or hashes.SHA256()).public_bytes(PEM)


def pkcs8(key):
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def der(content):
    return x509.load_pem_x509_certificate(content).public_bytes(serialization.Encoding.DER)


def vouched(name, own, scope=SCOPE, keys=KEYS):
    return open_voucher(own.certificate, own.key, None, device_id="").vouch(scope, name, *keys)


def with_a_longer_number(signature):
    """The same numbers, of which the first begins with a zero that it needs not."""
    length = signature[3]
    return b"\x30" + bytes([signature[1] + 1, 2, length + 1, 0]) + signature[4:]


def with_a_second_algorithm(certificate):
    """The same algorithm beside the signature, where no signature covers it, written otherwise."""
    plain, other = (
        bytes.fromhex(f"30{n}06082a8648ce3d040302{more}") for n, more in (("0a", ""), ("0c", "0500"))
    )
    head, _, tail = certificate[4:].rpartition(plain)
    whole = head + other + tail
    return b"\x30\x82" + len(whole).to_bytes(2, "big") + whole


def enrolled(folder: Path, name: str) -> Own:
    """A device's, of the product's own authority."""
    found = enrol(name, out=folder / name)
    sign(folder / "trust", request=found.request, out=folder / name)
    return Own(Path(found.certificate).read_bytes(), Path(found.key).read_bytes())


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority")
    init(folder / "trust", hosts=["server"])
    return folder


def compared(folder, cases, pems, *, vouchers=(), strange=(), now=NOW):
    """What Node says of each case, and Python; of what Node was to open besides, what it made of that."""
    given = {
        "scope": {"job": SCOPE.job, "group": SCOPE.group},
        "keys": [key.hex() for key in KEYS],
        "now": now.isoformat(),
        "authorities": [pem.decode() for pem in pems],
        "peers": [
            {
                "device_id": case.device_id,
                "certificate": case.certificate.hex(),
                "signature": case.signature.hex(),
                "authority": case.authority,
            }
            for case in cases
        ],
        "vouchers": [
            {"device_id": name, "certificate": certificate.decode(), "key": key.decode()}
            for name, (certificate, key) in vouchers
        ],
        "strange": list(strange),
    }
    path = folder / "cases.json"
    path.write_text(json.dumps(given))
    found, known = run("vouching.mjs", path), [open_authorities(pem, "ca") for pem in pems]
    return found, [_of_python(case, known[case.authority], now) for case in cases]


def _of_python(case: Case, authorities: Authorities, now: datetime) -> list[str]:
    peer = MaskPeer(
        place=1,
        device_id=case.device_id,
        mask_key=KEYS[0],
        share_key=KEYS[1],
        certificate=case.certificate,
        signature=case.signature,
    )
    return [problem_of_peer(SCOPE, peer), authorities.problem(case.certificate, now)]


def test_certificates_of_the_products_own_authority_are_told_in_the_same_words(authority, tmp_path):
    kitchen, hall = enrolled(authority, "kitchen"), enrolled(authority, "hall")
    init(tmp_path / "trust", hosts=["server"])
    foreign = enrolled(tmp_path, "kitchen")
    server = Own(*((authority / "trust" / f"server.{kind}").read_bytes() for kind in ("crt", "key")))
    own, told = vouched("kitchen", kitchen), (authority / "trust" / "ca.crt").read_bytes()
    swapped = vouched("kitchen", kitchen, keys=KEYS[::-1])
    cases = [
        Case("kitchen", *own),
        Case("kitchen", b"", b""),
        Case("kitchen", *vouched("kitchen", hall)),
        Case("hall", *own),
        Case("kitchen", *vouched("kitchen", foreign)),
        Case("server", *vouched("server", server)),
        Case("kitchen", own.certificate, swapped.signature),
        Case("kitchen", *vouched("kitchen", kitchen, scope=Scope("words", "1-4"))),
        Case("kitchen", *vouched("kitchen", kitchen, scope=Scope("other", "1-0"))),
        Case("kitchen", own.certificate, b""),
        Case("kitchen", own.certificate, own.signature + b"\0"),
        Case("kitchen", own.certificate, vouched("kitchen", hall).signature),
        Case("kitchen", own.certificate, with_a_longer_number(own.signature)),
        Case("kitchen", with_a_second_algorithm(own.certificate), own.signature),
        Case("kitchen", own.certificate + b"\0", own.signature),
        Case("kitchen", b"\x30\x82", b""),
        Case("kitchen", bytes(500), b""),
        Case("kitchen", b"-----BEGIN CERTIFICATE-----", b""),
    ]
    for now in (NOW, NOW + timedelta(days=40_000)):
        found, expected = compared(tmp_path, cases, [told], now=now)
        assert found["told"] == expected
        assert bool(expected[0][1]) == (now != NOW)
    assert expected[0][0] == ""
    assert all(any(row) for row in expected[1:])
    assert "holds from" in expected[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_key_vouches_and_signs_as_in_python(kind, tmp_path):
    """A device's key, and an authority's: with SHA-256, and with longer digests."""
    home, own = KINDS["P-256"](), KINDS[kind]()
    pems = [made("home", home, "home", home), made("house", own, "house", own)]
    device = Own(made("kitchen", own, "home", home), pkcs8(own))
    signed = open_voucher(device.certificate, device.key, None, device_id="kitchen")
    assert (signed is None) == (kind == "Ed25519"), "Python's devices vouch with ECDSA and RSA alone"
    voucher = signed or Voucher(der(device.certificate), home)
    cases = [Case("kitchen", *voucher.vouch(SCOPE, "kitchen", *KEYS))]
    for digest in (hashes.SHA256(), hashes.SHA384(), hashes.SHA512()):
        lent = Own(made("kitchen", home, "house", own, digest=digest), pkcs8(home))
        cases.append(Case("kitchen", *vouched("kitchen", lent), authority=1))
    found, expected = compared(tmp_path, cases, pems, vouchers=[("kitchen", device)])
    assert found["told"] == expected
    assert expected[1:] == [["", ""]] * 3
    (said,) = found["vouched"]
    assert found["without"].startswith("ConfigError: this device's certificate needs crypto.subtle")
    if kind == "Ed25519":
        assert "of a kind of key that is not taken" in expected[0][0]
        assert said.startswith("ConfigError: this device's key is of a kind that cannot vouch")
    else:
        assert expected[0] == ["", ""]
        (of_node,) = [Case("kitchen", bytes.fromhex(said["certificate"]), bytes.fromhex(said["signature"]))]
        assert _of_python(of_node, open_authorities(pems[0], "ca"), NOW) == ["", ""]


def test_purposes_names_ends_and_several_authorities_are_read_as_in_python(tmp_path):
    home, other, own = (KINDS["P-256"]() for _ in range(3))
    pems = [
        made("home", other, "home", other) + made("home", home, "home", home),
        b"one\n" + made("office", other, "office", other),
    ]
    client, server = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
    nobody, twice = x509.Name([]), x509.Name([*common_name("a"), *common_name("b")])
    given = [
        made("a", own, "home", home, purposes=[client]),
        made("a", own, "home", home, purposes=[server]),
        made("a", own, "home", home, purposes=[server, client]),
        made("a", own, "home", home, ends=NOW - timedelta(seconds=1)),
        made("a", own, "home", home, ends=NOW),
        made("a", own, "home", home, ends=datetime(2060, 1, 2, tzinfo=timezone.utc)),
        made("a", own, "home", home, begins=NOW + timedelta(seconds=1)),
        made("a", own, "home", own),
        made("a", own, "strangers", home),
        made(nobody, own, "home", home),
        made(twice, own, "home", home),
        made("Küche", own, "home", home),
    ]
    cases = [Case("a", *vouched("a", Own(pem, pkcs8(own)))) for pem in given]
    cases += [case._replace(authority=1) for case in cases]
    found, expected = compared(tmp_path, cases, pems)
    assert found["told"] == expected
    assert [not any(row) for row in expected[:6]] == [True, False, True, False, True, True]
    assert all(any(row) for row in expected[6:])


def test_what_is_no_certificate_or_key_of_its_own_is_one_sentence(authority, tmp_path):
    hall, cellar = enrolled(authority, "hall"), enrolled(authority, "cellar")
    secret = serialization.load_pem_private_key(hall.key, None)
    locked = secret.private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    old = secret.private_bytes(
        PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    told = (authority / "trust" / "ca.crt").read_bytes()
    ended = made("hall", secret, "home", secret, ends=NOW - timedelta(days=1))
    vouchers = {
        "is of 'hall'; this device is 'kitchen'": ("kitchen", hall),
        "do not belong together": ("hall", Own(hall.certificate, cellar.key)),
        "is encrypted": ("hall", Own(hall.certificate, locked)),
        "no private key in PEM": ("hall", Own(hall.certificate, old)),
        "is damaged, or not": ("hall", Own(hall.certificate, pkcs8(KINDS["RSA"]()))),
        "no certificate in PEM": ("hall", Own(hall.key, hall.key)),
        "ask its authority for another": ("hall", Own(ended, hall.key)),
    }
    strange = [
        "",
        hall.key.decode(),
        told.decode().replace("MII", "M*I"),
        told.decode().replace("MII", "MIJ"),
    ]
    strange += ["x" * 65_537, (told + hall.certificate).decode()]
    found, _ = compared(tmp_path, [], [told], vouchers=vouchers.values(), strange=strange)
    for said, part in zip(found["vouched"], vouchers, strict=True):
        assert said.startswith("ConfigError: "), said
        assert part in said
    assert all("no certificate of an authority in PEM" in said for said in found["opened"][:4])
    assert "more than 65536 characters" in found["opened"][4]
    assert found["opened"][5] == 2
    assert "\n" not in json.dumps(found)


MASKS = """
import { pathToFileURL } from "node:url";
const at = (name) => import(pathToFileURL(`${process.argv[1]}/${name}`));
const [{ Masking }, { memoryStore }, vouching, messages] = await Promise.all(
  ["device/masking.mjs", "device/store.mjs", "wire/sums/vouching.mjs", "wire/messages.mjs"].map(at));
const { deviceId, certificate, key, authority, steps } = JSON.parse(process.argv[2]), store = memoryStore();
const home = { deviceId, job: "words", store, facts: store, key: (name) => name, onEvent() {}, send() {},
  voucher: certificate && await vouching.openVoucher(certificate, key, { deviceId }),
  authorities: authority && vouching.openAuthorities(authority) };
const said = [];
let masking = new Masking(home);
for (const { begin, take, restart, forget } of steps) {
  try {
    if (forget) await masking.forget();
    else if (restart) await (masking = new Masking(home)).open();
    else if (begin) await masking.begin({ job: "words", task_id: "task", round: 1, mask_group: begin }, begin);
    else await masking.take({ ...messages.decode(Buffer.from(take, "hex")), mask_key: masking.state.keys.mask_key });
    said.push("");
  } catch (error) {
    said.push(`${error.name}: ${error.message}`);
  }
}
console.log(JSON.stringify({ said, keys: Buffer.from(messages.encode(masking.state.keys)).toString("hex") }));
"""


def masked(device_id, own, authority, *steps):
    """What a device in Node says at each step of ``begin`` and ``take``, and the keys that it told last."""
    given = {"deviceId": device_id, "authority": authority, "steps": steps}
    given |= {"certificate": own.certificate.decode(), "key": own.key.decode()} if own else {}
    command = [NODE, "--input-type=module", "-e", MASKS, WEB, json.dumps(given)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found["said"], decode(bytes.fromhex(found["keys"]))


def group_of(owns, group, *, certified_for=""):
    """A group of three in which ``page`` is the first; its own mask key is filled in by the device."""
    scope, peers = Scope("words", certified_for or group), []
    for place, (name, own) in enumerate(owns.items(), 1):
        keys = public_of(new_secret()), public_of(new_secret())
        beside = vouched(name, own, scope=scope, keys=keys)._asdict() if own else {}
        peers.append(MaskPeer(place=place, device_id=name, mask_key=keys[0], share_key=keys[1], **beside))
    fields = {
        "job": "words",
        "task_id": "task",
        "round": 1,
        "group": group,
        "place": 0,
        "mask_key": bytes(32),
    }
    return {"take": encode(MaskGroup(**fields, threshold=2, peers=peers)).hex()}


def test_a_device_masks_with_those_alone_whom_an_authority_vouches_for_and_never_twice_in_a_group(
    authority, tmp_path
):
    told = (authority / "trust" / "ca.crt").read_text()
    own, one, two = (enrolled(authority, name) for name in ("page-0", "one", "two"))
    init(tmp_path / "trust", hosts=["server"])
    foreign = enrolled(tmp_path, "two")
    good = group_of({"one": one, "two": two}, "1-0")
    said, keys = masked("page-0", own, told, {"begin": "1-0"}, good)
    assert said == ["", ""]
    assert problem_of_peer(Scope("words", "1-0"), keys) == ""
    assert "did not sign" in problem_of_peer(Scope("words", "1-4"), keys)
    said, keys = masked("page-0", None, told, {"begin": "1-0"}, group_of({"one": one, "two": None}, "1-0"))
    assert said[1] == "ConfigError: masks: the keys told of two: no certificate is beside its keys"
    assert keys.certificate == keys.signature == b""
    said, _ = masked("page-0", own, told, {"begin": "1-0"}, group_of({"one": one, "two": foreign}, "1-0"))
    assert said[1].endswith("two: no authority that this device trusts signed its certificate")
    steps = [
        {"begin": "1-0"},
        group_of({"one": two, "two": one}, "1-0"),
        group_of({"one": one, "two": two}, "1-0", certified_for="1-4"),
        group_of({"one": one, "two": two}, "1-4"),
        {"restart": True},
        good,
        {"begin": "1-0"},
        {"begin": "1-4"},
        {"begin": "1-2"},
        {"begin": "now"},
        {"restart": True},
        {"begin": "1-3"},
        {"forget": True},
        {"begin": "1-4"},
        {"begin": "2-0"},
    ]
    said, _ = masked("page-0", own, told, *steps)
    parts = [
        "",
        "of one: its certificate is of 'two', two: its certificate is of 'one'",
        "one: its certificate's key did not sign its keys for this group",
        "masks: group '1-4'; this device's keys are for '1-0'",
        "",
        "",
        "",
        "",
        "keys for group '1-4' of job 'words' were made before this one's, '1-2'",
        "names no group of an attempt",
        "",
        "were made before this one's, '1-3'",
        "",
        "were made before this one's, '1-4'",
        "",
    ]
    assert [bool(one) for one in said] == [bool(part) for part in parts], said
    for words, part in zip(said, parts, strict=True):
        assert part in words
    said, _ = masked("page-0", own, "", {"begin": "1-0"}, group_of({"one": None, "two": None}, "1-0"))
    assert said == ["", ""], "who names no authority masks with any"


def mutated(case: Case, rng: random.Random) -> Case:
    """A bit or byte changed, some bytes cut out or put in twice, in the certificate or in the signature."""
    field = rng.choice(["certificate"] * 4 + ["signature"])
    whole = getattr(case, field)
    place = rng.randrange(len(whole))
    end = min(len(whole), place + rng.randrange(1, 9))
    ways = [
        whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :],
        whole[:place] + rng.randbytes(1) + whole[place + 1 :],
        whole[:place] + whole[end:],
        whole[:end] + whole[place:],
        whole[:place],
    ]
    return case._replace(**{field: rng.choice(ways)})


def check_mutations(authority, folder, count):
    """Neither side throws, and Node takes what Python takes: but for a signature with a count of unused bits, that are zeros."""
    name, rng = "kitchen", random.Random(5)
    folder.mkdir(exist_ok=True)
    own = Case(name, *vouched(name, enrolled(authority, name)))
    cases = [mutated(own, rng) for _ in range(count)]
    found, expected = compared(folder, [own, *cases], [(authority / "trust" / "ca.crt").read_bytes()])
    assert found["told"][0] == expected[0] == ["", ""]
    unused = len(own.certificate) - len(x509.load_der_x509_certificate(own.certificate).signature) - 1
    for case, ours, theirs in zip(cases, found["told"][1:], expected[1:], strict=True):
        assert ours[1] != "it threw", (case, ours)
        assert any(ours) == (case != own)
        if case == own or case.certificate[unused : unused + 1] == b"\0":
            assert any(theirs) == any(ours), (case, ours, theirs)


def test_no_mutation_escapes_or_is_taken(authority, tmp_path):
    check_mutations(authority, tmp_path / "some", 250)


@pytest.mark.slow
def test_thousands_of_mutations(authority, tmp_path):
    check_mutations(authority, tmp_path / "many", 5_000)
