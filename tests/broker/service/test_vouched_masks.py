"""Who stands in the middle of a sum under masks reads an update where nobody vouches for keys, and none where somebody does."""

import msgspec
import numpy as np
import pytest
from cryptography import x509
from fleet import Aggregator, Device, LinearTraining, World, first_adapter, points_of

from fleetune.broker.authority.authority import init, sign
from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.work import device_seed
from fleetune.device_runtime.agent.masking import FILE
from fleetune.device_runtime.commands.enrol import enrol
from fleetune.device_runtime.contracts.mask_messages import MaskGroup, MaskKeys, MaskPeer, MaskShares
from fleetune.device_runtime.contracts.secure_sums.grid import placed, read_numbers, reduced, weight_of
from fleetune.device_runtime.contracts.secure_sums.keys import Scope, new_secret, public_of, unseal
from fleetune.device_runtime.contracts.secure_sums.masking import Masker, mask
from fleetune.device_runtime.contracts.secure_sums.shares import SHARE_BYTES, combine
from fleetune.device_runtime.contracts.secure_sums.vouching import problem_of_peer
from fleetune.device_runtime.contracts.wire import Chunk, Decline, decode, encode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.signing import Trust, Vouching, vouching_of

SIZE, NUMBERS = 40, (0, 1, 2, 3)
VICTIM = "device-0"
QUICK = Patience(deadline_s=100.0, secure_s=10.0, gather_s=5.0, extensions_max=0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority")
    init(folder / "trust", hosts=["server"])
    return folder


def reach_of(authority, name):
    own = authority / name
    made = enrol(name, out=own)
    sign(authority / "trust", request=made.request, out=own)
    return Reach(ca_file=str(authority / "trust" / "ca.crt"), cert=made.certificate, key=made.key)


@pytest.fixture(scope="module")
def vouching(authority):
    names = [f"device-{n}" for n in NUMBERS]
    return {name: vouching_of(reach_of(authority, name), Trust(), device_id=name) for name in names}


def fleet(folder, vouching, disturb=lambda topic, payload: (payload,), **changes):
    log = []

    def listening(topic, payload):
        log.append((topic, payload))
        return disturb(topic, payload)

    server = Loopback(disturb=listening)
    fields = {"rounds": 1, "clients": 4, "min_clients": 3, "secure": "masks", "secure_range": 0.01, **changes}
    aggregator = Aggregator(server, folder, size=SIZE, patience=QUICK, **fields).start()
    devices = []
    for n in NUMBERS:
        found = vouching.get(f"device-{n}", Vouching())
        options = {"voucher": found.voucher, "mask_authorities": found.authorities}
        devices.append(Device(server, folder, n, size=SIZE, **options).start())
    world = World(server, aggregator, devices)
    world.log = log
    return world


def said(world, kind):
    return [m for _, payload in world.log if isinstance(m := decode(payload), kind)]


class Middleman:
    """The MQTT server, with keys of its own in the place of all whom the victim masks with."""

    def __init__(self, forge=lambda peer, scope: {"certificate": b"", "signature": b""}):
        self.forge, self.secrets, self.keys = forge, {}, None
        self.group, self.seed, self.secret, self.pieces = None, None, None, {}

    def __call__(self, topic, payload):
        if not payload:
            return (payload,)
        message = decode(payload)
        if isinstance(message, MaskKeys) and message.device_id == VICTIM:
            self.keys = message
        elif isinstance(message, MaskGroup) and f"/{VICTIM}/down" in topic:
            return (encode(self.swapped(message)),)
        elif isinstance(message, MaskShares) and message.device_id == VICTIM:
            self.open(message)
        elif isinstance(message, Chunk) and f"/{VICTIM}/up" in topic:
            self.pieces[message.index] = message.data
        return (payload,)

    def swapped(self, group):
        scope, peers = Scope(group.job, group.group), []
        for peer in group.peers:
            own = self.secrets.setdefault(peer.device_id, (new_secret(), new_secret()))
            mine = msgspec.structs.replace(peer, mask_key=public_of(own[0]), share_key=public_of(own[1]))
            peers.append(msgspec.structs.replace(mine, **self.forge(mine, scope)))
        self.group = msgspec.structs.replace(group, peers=peers)
        return self.group

    def open(self, message):
        """Read the shares that were sealed for its own keys: enough of them are the victim's secrets."""
        scope, seeds, secrets = Scope(message.job, message.group), {}, {}
        names = {peer.place: peer.device_id for peer in self.group.peers}
        for share in message.shares:
            name = names[share.place]
            text = unseal(
                share.data, self.secrets[name][1], self.keys.share_key, scope, sender=VICTIM, receiver=name
            )
            seeds[share.place + 1], secrets[share.place + 1] = text[:SHARE_BYTES], text[SHARE_BYTES:]
        self.seed, self.secret = (combine(one, self.group.threshold) for one in (seeds, secrets))

    def read(self, settings):
        """Take the masks off the victim's update."""
        payload = b"".join(self.pieces[i] for i in sorted(self.pieces))
        numbers = read_numbers(payload, first_adapter(SIZE), settings.grid)
        masks = np.zeros_like(numbers)
        scope = Scope(self.group.job, self.group.group)
        masker = Masker(scope, VICTIM, self.group.place, self.secret, self.seed)
        mask(masks, masker, self.group.peers, settings.grid)
        numbers -= masks
        reduced(numbers, settings.grid)
        return numbers


def numbers_of(settings, number):
    """What a device's update is on the grid, before any mask."""
    seed, reference = device_seed(settings.seed, round_number=1, position=number), first_adapter(SIZE)
    training = LinearTraining(
        points_of(number, SIZE),
        LocalWork(steps=settings.work.steps, seed=seed),
        {n: v.copy() for n, v in reference.items()},
    )
    while not training.done:
        training.step()
    weight = weight_of(settings.grid, len(training.points[0]))
    return placed(training.adapter, reference, settings.grid, weight=weight, seed=seed).numbers


def test_where_nobody_vouches_a_server_with_its_own_keys_reads_an_update(tmp_path):
    middleman = Middleman()
    world = fleet(tmp_path, {}, middleman)
    world.run(until=lambda: middleman.pieces)
    settings = world.aggregator.settings
    np.testing.assert_array_equal(middleman.read(settings), numbers_of(settings, 0))


def kept(peer, scope):
    """Keep the certificate and signature of the one in whose place it stands."""
    return {}


def signed_by(name, authority, *, with_key_of=""):
    """Show a certificate that it holds the key of."""
    found = vouching_of(
        Reach(
            cert=str(authority / "trust" / f"{name}.crt"),
            key=str(authority / "trust" / f"{with_key_of or name}.key"),
        ),
        Trust(),
        device_id="",
    )

    def forge(peer, scope):
        return found.voucher.vouch(scope, peer.device_id, peer.mask_key, peer.share_key)._asdict()

    return forge


def of_its_own_authority(folder):
    """Certificates of the right names, of an authority of its own."""
    init(folder / "trust", hosts=["server"])
    vouchers = {}

    def forge(peer, scope):
        if peer.device_id not in vouchers:
            reach = reach_of(folder, peer.device_id)
            vouchers[peer.device_id] = vouching_of(reach, Trust(), device_id=peer.device_id).voucher
        return vouchers[peer.device_id].vouch(scope, peer.device_id, peer.mask_key, peer.share_key)._asdict()

    return forge


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("none", "no certificate is beside its keys"),
        ("kept", "did not sign its keys for this group"),
        ("the server's", "its certificate is of 'server'"),
        ("its own authority's", "no authority that this device trusts"),
    ],
)
def test_where_an_authority_vouches_swapped_keys_are_declined_by_name(
    tmp_path, authority, vouching, how, why
):
    forges = {
        "kept": lambda: kept,
        "the server's": lambda: signed_by("server", authority),
        "its own authority's": lambda: of_its_own_authority(tmp_path),
    }
    middleman = Middleman(forges[how]()) if how in forges else Middleman()
    world = fleet(tmp_path, vouching, middleman)
    world.run(until=lambda: world.aggregator.service.federation.rounds.closed)
    (declined, *_) = said(world, Decline)
    assert declined.device_id == VICTIM
    assert why in declined.reason
    assert "device-1" in declined.reason
    assert not middleman.pieces, "nothing of the victim's update has left it"
    assert middleman.seed is None


def test_with_certificates_the_bits_are_those_without(tmp_path, vouching):
    versions = []
    for name, found in (("with", vouching), ("without", {})):
        world = fleet(tmp_path / name, found).run()
        versions.append(world.aggregator.version(1))
        told = [peer for group in said(world, MaskGroup) for peer in group.peers]
        assert all(bool(peer.certificate) == (name == "with") for peer in told)
    assert versions[0] == versions[1]


def test_a_device_without_a_certificate_is_left_out_where_enough_have_one(tmp_path, vouching):
    some = {name: found for name, found in vouching.items() if name != "device-3"}
    world = fleet(tmp_path, some).run()
    assert {peer.device_id for group in said(world, MaskGroup) for peer in group.peers} == {*some}
    assert world.aggregator.service.federation.rounds.closed == 1


def of_another_version(certificate):
    return certificate.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05")


SPOILT = {
    "its certificate's key did not sign its keys for this group": lambda keys: {
        "signature": keys.signature[:-1] + b"\0"
    },
    "its certificate is damaged": lambda keys: {"certificate": of_another_version(keys.certificate)},
}


@pytest.mark.parametrize("why", SPOILT)
def test_keys_whose_signature_or_certificate_does_not_fit_reach_no_other_device(
    why, tmp_path, vouching, caplog
):
    def disturb(topic, payload):
        message = decode(payload) if payload else None
        if isinstance(message, MaskKeys) and message.device_id == "device-2":
            payload = encode(msgspec.structs.replace(message, **SPOILT[why](message)))
        return (payload,)

    world = fleet(tmp_path, vouching, disturb).run()
    names = {peer.device_id for group in said(world, MaskGroup) for peer in group.peers}
    assert names == {"device-0", "device-1", "device-3"}
    assert why in caplog.text


def test_keys_of_an_earlier_attempt_are_no_keys_of_this_one(vouching):
    keys = [public_of(new_secret()) for _ in range(2)]
    earlier, now = Scope("job", "1-0"), Scope("job", "1-4")
    voucher = vouching["device-1"].voucher
    peer = MaskPeer(place=1, device_id="device-1", mask_key=keys[0], share_key=keys[1])
    peer = msgspec.structs.replace(peer, **voucher.vouch(earlier, "device-1", *keys)._asdict())
    assert problem_of_peer(earlier, peer) == ""
    assert "did not sign its keys for this group" in problem_of_peer(now, peer)
    assert "did not sign" in problem_of_peer(
        earlier, msgspec.structs.replace(peer, mask_key=peer.share_key, share_key=peer.mask_key)
    )


def test_the_server_s_certificate_makes_no_device(authority, vouching):
    found = signed_by("server", authority)
    peer = MaskPeer(place=1, device_id="server", mask_key=bytes(32), share_key=bytes(32))
    made = msgspec.structs.replace(peer, **found(peer, Scope("job", "1-0")))
    assert problem_of_peer(Scope("job", "1-0"), made) == ""
    assert "it is for something else" in vouching["device-1"].authorities.problem(made.certificate)


def test_an_ended_certificate_vouches_for_nobody(vouching):
    from datetime import datetime, timezone

    found = vouching["device-1"]
    assert found.authorities.problem(found.voucher.certificate) == ""
    late = datetime(2100, 1, 1, tzinfo=timezone.utc)
    assert "holds from" in found.authorities.problem(found.voucher.certificate, late)


def test_no_device_makes_keys_for_a_group_twice(tmp_path, vouching):
    """Secrets of a group may have been told: keys for it again would fit what was told."""
    world = fleet(tmp_path, vouching)
    world.run(until=lambda: said(world, MaskGroup))
    (device,) = [d for d in world.devices if d.name == VICTIM]
    device.kill()
    (device.folder / FILE).unlink()
    device.start()
    world.run(until=lambda: said(world, Decline))
    (declined, *_) = said(world, Decline)
    assert declined.device_id == VICTIM
    assert "keys for group '1-0' of job 'job' were made before" in declined.reason


@pytest.mark.parametrize("content", [b"", b"\x30\x82", b"-----BEGIN CERTIFICATE-----", bytes(500)])
def test_damaged_certificates_are_told(vouching, content):
    peer = MaskPeer(place=1, device_id="a", mask_key=bytes(32), share_key=bytes(32), certificate=content)
    assert "certificate" in problem_of_peer(Scope("job", "1-0"), peer)
    assert "damaged" in vouching["device-1"].authorities.problem(content)


@pytest.mark.filterwarnings("ignore")  # cryptography warns of numbers and names that a stranger chose
def test_of_a_certificate_with_any_bit_changed_something_is_said_and_none_is_taken(vouching):
    """Versions, extensions and keys that ``cryptography`` has errors of its own for escape nobody."""
    scope, keys, found = Scope("job", "1-0"), (bytes(32), bytes([1]) * 32), vouching["device-1"]
    peer = MaskPeer(place=1, device_id="device-1", mask_key=keys[0], share_key=keys[1])
    peer = msgspec.structs.replace(peer, **found.voucher.vouch(scope, "device-1", *keys)._asdict())
    unused = len(peer.certificate) - len(x509.load_der_x509_certificate(peer.certificate).signature) - 1
    whole = int.from_bytes(peer.certificate, "big")
    changed = [(whole ^ 1 << bit).to_bytes(len(peer.certificate), "big") for bit in range(whole.bit_length())]
    changed = [c for c in changed if c[unused] == 0]  # how many last bits of the signature count, zeros all
    twice = peer.certificate.replace(bytes.fromhex("551d23"), bytes.fromhex("551d25"))
    for content in (*changed, twice, of_another_version(peer.certificate)):
        problem_of_peer(scope, msgspec.structs.replace(peer, certificate=content))
        assert found.authorities.problem(content)


def test_who_vouches_for_others_follows_from_one_s_own_certificate(authority, tmp_path):
    reach = reach_of(authority, "kitchen")
    assert vouching_of(reach, Trust(), device_id="kitchen").where == reach.ca_file
    assert vouching_of(reach, Trust(), device_id="other") == Vouching(), "a certificate of another name"
    assert vouching_of(reach, Trust(mask_authority="none"), device_id="kitchen").authorities is None
    assert vouching_of(Reach(), Trust(), device_id="kitchen") == Vouching()
    init(tmp_path / "trust", hosts=["server"])
    foreign = Reach(ca_file=str(tmp_path / "trust" / "ca.crt"), cert=reach.cert, key=reach.key)
    assert vouching_of(foreign, Trust(), device_id="kitchen").authorities is None
