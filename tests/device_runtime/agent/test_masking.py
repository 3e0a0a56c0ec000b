"""What a device does with its masks: keys, shares and answers, spoken to by hand; what it refuses, also after a kill."""

import math
import stat
import sys

import msgspec
import numpy as np
import pytest
from fleet import first_adapter, points_of, workbench_of
from signed import SignedStage
from stage import NAME, Stage, locally

from fleetune.device_runtime.contracts.mask_messages import (
    MaskAsk,
    MaskGroup,
    MaskInbox,
    MaskKeys,
    MaskPeer,
    MaskReveal,
    MaskShare,
    MaskShares,
)
from fleetune.device_runtime.contracts.secure_sums.grid import (
    added,
    mean_change,
    placed,
    read_numbers,
    weight_of,
)
from fleetune.device_runtime.contracts.secure_sums.keys import (
    Scope,
    digest_of_seed,
    need_cryptography,
    new_secret,
    new_seed,
    public_of,
    seal,
    unseal,
)
from fleetune.device_runtime.contracts.secure_sums.masking import Unmasking, unmask
from fleetune.device_runtime.contracts.secure_sums.shares import SHARE_BYTES, combine, split
from fleetune.device_runtime.contracts.wire import Decline, Finished, UpdateReady
from fleetune.device_runtime.contracts.work import LocalWork, SumGrid
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.terms.terms import Terms

GRID = SumGrid(bits=16, weight_bits=10, summands=4, limit=0.01)
WORK = LocalWork(steps=4, seed=1, codec="masked")
ME = 3
HEADER = {"job": "job", "task_id": "t-1", "round": 1}


class Peer:
    """Another device of the group."""

    def __init__(self, place):
        self.place, self.name = place, f"peer-{place}"
        self.secret, self.share_secret, self.seed = new_secret(), new_secret(), new_seed()
        self.seeds = self.secrets = {}

    @property
    def told(self):
        return MaskPeer(
            place=self.place,
            device_id=self.name,
            mask_key=public_of(self.secret),
            share_key=public_of(self.share_secret),
        )

    def seals(self, keys, threshold=3, *, group="1-0", holders=(1, 2, 3, 4)):
        self.seeds, self.secrets = (split(one, holders, threshold) for one in (self.seed, self.secret))
        text = self.seeds[ME + 1] + self.secrets[ME + 1]
        scope = Scope("job", group)
        data = seal(text, self.share_secret, keys.share_key, scope, sender=self.name, receiver=NAME)
        return MaskShare(place=self.place, data=data)


class Talk:
    """A device on a stage, and three peers played by hand."""

    def __init__(self, folder, **options):
        self.stage, self.peers = Stage(folder, **options), [Peer(place) for place in range(3)]

    def offer(self, **changes):
        self.stage.aggregator.offer(1, **{"work": WORK, "grid": GRID, "task_id": "t-1", **changes})
        self.stage.poll(8)
        return self.stage.aggregator.heard()

    def say(self, message, *kinds, polls=3):
        self.stage.aggregator.say(message)
        self.stage.poll(polls)
        return self.stage.aggregator.heard(*kinds)

    def keys(self):
        return next(m for m in self.offer() if isinstance(m, MaskKeys))

    def group(self, keys, **changes):
        fields = {"group": "1-0", "place": ME, "mask_key": keys.mask_key, "threshold": 3}
        fields["peers"] = [peer.told for peer in self.peers]
        return MaskGroup(**HEADER, **fields | changes)

    def inbox(self, keys, **changes):
        shares = [peer.seals(keys) for peer in self.peers]
        return MaskInbox(**HEADER, **{"group": "1-0", "shares": shares, **changes})

    def to_update(self):
        """All up to the masked update; (keys, shares, update)."""
        keys = self.keys()
        (shares,) = self.say(self.group(keys), MaskShares)
        said = self.say(self.inbox(keys), UpdateReady, polls=12)
        return keys, shares, said[-1]

    def restart(self):
        self.stage.device.kill()
        self.stage.device.start()


@pytest.fixture
def talk(tmp_path):
    return Talk(tmp_path)


def ask(delivered=(0, 1, 2, 3), dropped=(), **changes):
    fields = {"group": "1-0", "delivered": [*delivered], "dropped": [*dropped]}
    return MaskAsk(**{**HEADER, **fields, **changes})


def dropped(caplog):
    return [r.message.partition(": ")[2] for r in caplog.records if "dropped a message" in r.message]


def test_what_the_device_sends_is_its_numbers_under_all_masks(talk):
    keys, shares, update = talk.to_update()
    assert update.codec == "masked"
    payload = talk.stage.pull(update)
    reference = first_adapter()
    numbers = read_numbers(payload, reference, GRID)
    opened = [
        unseal(
            share.data,
            peer.share_secret,
            keys.share_key,
            Scope("job", "1-0"),
            sender=NAME,
            receiver=peer.name,
        )
        for share, peer in zip(shares.shares, talk.peers, strict=True)
    ]
    seed = combine({i + 1: text[:SHARE_BYTES] for i, text in enumerate(opened)}, 3)
    secret = combine({i + 1: text[SHARE_BYTES:] for i, text in enumerate(opened)}, 3)
    assert digest_of_seed(seed) == keys.seed_digest
    assert public_of(secret) == keys.mask_key
    me = MaskPeer(place=ME, device_id=NAME, mask_key=keys.mask_key, share_key=keys.share_key)
    members = (*(peer.told for peer in talk.peers), me)
    secrets = {peer.place: peer.secret for peer in talk.peers}
    unmask(numbers, Unmasking(Scope("job", "1-0"), members, 3, (ME,), {ME: seed}, secrets), GRID)
    weight = weight_of(GRID, len(points_of(3)[0]))
    assert (numbers == placed(locally(1), reference, GRID, weight=weight, seed=1).numbers).all()


def test_it_trains_while_the_group_is_made_and_then_waits(talk):
    talk.keys()
    talk.stage.poll(10)
    assert talk.stage.device.agent.poll(talk.stage.now) is False
    assert [e.kind for e in talk.stage.device.events][-1] == "step"
    assert not talk.stage.aggregator.heard(UpdateReady)


def test_keys_and_shares_are_the_same_after_a_kill(talk):
    keys = talk.keys()
    talk.restart()
    assert talk.keys() == keys
    (shares,) = talk.say(talk.group(keys), MaskShares)
    talk.restart()
    talk.stage.poll(3)
    assert talk.stage.aggregator.heard(MaskShares)[-1] == shares


def test_the_answer_is_one_kind_of_share_of_each(talk):
    keys, *_ = talk.to_update()
    (reveal,) = talk.say(ask((0, 1, 3), (2,)), MaskReveal)
    assert [s.place for s in reveal.seeds] == [0, 1, 3]
    assert [(s.place, s.data) for s in reveal.secrets] == [(2, talk.peers[2].secrets[ME + 1])]
    assert [s.data for s in reveal.seeds[:2]] == [p.seeds[ME + 1] for p in talk.peers[:2]]
    assert keys.seed_digest not in (reveal.seeds[2].data, b"")


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_second_question_that_is_another_is_refused_also_after_a_kill(talk, caplog, is_killed):
    talk.to_update()
    (reveal,) = talk.say(ask((0, 1, 3), (2,)), MaskReveal)
    if is_killed:
        talk.restart()
    assert talk.say(ask((0, 1, 3), (2,)), MaskReveal) == [reveal], "the same again"
    assert talk.say(ask((0, 2, 3), (1,)), MaskReveal) == []
    assert talk.say(ask((0, 1, 2, 3)), MaskReveal) == []
    assert any("would bare its update" in said for said in dropped(caplog))


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (ask((0, 1, 2, 3), (2,)), "one share of each"),
        (ask((0, 1, 1, 2, 3)), "one share of each"),
        (ask((0, 1, 3)), "one share of each"),
        (ask((0, 1, 2, 3), (7,)), "one share of each"),
        (ask((0, 1, 2), (3,)), "this device has dropped out"),
        (ask((0, 3), (1, 2)), "its threshold is 3"),
        (ask(group="2-0"), "which this device is not in"),
        (ask(task_id="t-2"), "which this device is not at"),
    ],
)
def test_a_question_that_cannot_be_is_not_answered(talk, caplog, question, said):
    talk.to_update()
    fields = msgspec.structs.asdict(question)
    assert talk.say(MaskAsk(**fields), MaskReveal) == []
    assert any(said in one for one in dropped(caplog)), dropped(caplog)
    assert len(talk.say(ask(), MaskReveal)) == 1, "it has answered nothing yet"


def test_nothing_is_answered_before_there_are_masks(talk, caplog):
    keys = talk.keys()
    talk.say(talk.group(keys))
    assert talk.say(ask(), MaskReveal) == []
    assert dropped(caplog)


def twice(talk, **changes):
    peers = [peer.told for peer in talk.peers]
    return [*peers[:2], msgspec.structs.replace(peers[1], **changes)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda talk: {"threshold": 2}, "threshold 2 of 4: more than half"),
        (lambda talk: {"threshold": 5}, "threshold 5 of 4"),
        (lambda talk: {"threshold": 0}, "threshold 0 of 4"),
        (lambda talk: {"peers": [talk.peers[0].told], "threshold": 2}, "group with 1 others; at least 2"),
        (lambda talk: {"peers": []}, "group with 0 others"),
        (lambda talk: {"peers": twice(talk)}, "a place, device or key twice"),
        (lambda talk: {"peers": twice(talk, place=9, device_id="x")}, "a place, device or key twice"),
        (lambda talk: {"peers": twice(talk, place=9, mask_key=public_of(new_secret()))}, "key twice"),
        (lambda talk: {"place": 1}, "a place, device or key twice"),
        (lambda talk: {"mask_key": bytes(32)}, "another key of this device: it has lost its masks"),
        (
            lambda talk: {"peers": [msgspec.structs.replace(p.told, share_key=bytes([p.place]) + bytes(31)) for p in talk.peers]},
            "of small order",
        ),
    ],
)  # fmt: skip
def test_a_group_in_which_it_would_not_be_hidden_is_refused(talk, caplog, changes, said):
    keys = talk.keys()
    assert talk.say(talk.group(keys, **changes(talk)), MaskShares) == []
    assert any(said in one for one in dropped(caplog)), dropped(caplog)


def test_a_mask_key_of_small_order_declines_the_task(talk):
    keys = talk.keys()
    peers = [
        msgspec.structs.replace(talk.peers[0].told, mask_key=bytes(32)),
        *(p.told for p in talk.peers[1:]),
    ]
    talk.say(talk.group(keys, peers=peers))
    (decline,) = talk.say(talk.inbox(keys), Decline, polls=12)
    assert "small order" in decline.reason


def test_another_group_than_the_first_is_refused(talk, caplog):
    keys = talk.keys()
    (shares,) = talk.say(talk.group(keys), MaskShares)
    assert talk.say(talk.group(keys), MaskShares) == [shares]
    talk.say(talk.group(keys, threshold=4))
    assert any("another than was told before" in one for one in dropped(caplog))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ((0, 1, 1), "twice"),
        ((0, 1, 7), "not of this device's group"),
        ((0, 1, 3), "not of"),
        ((0,), "1 others"),
    ],
)
def test_shares_that_cannot_be_are_refused(talk, caplog, places, said):
    keys = talk.keys()
    talk.say(talk.group(keys))
    shares = [MaskShare(place=place, data=b"x" * 82) for place in places]
    assert talk.say(MaskInbox(**HEADER, group="1-0", shares=shares), UpdateReady, polls=12) == []
    assert any(said in one for one in dropped(caplog)), dropped(caplog)


def test_other_shares_than_the_first_are_refused(talk, caplog):
    keys, _, update = talk.to_update()
    payload = talk.stage.pull(update)
    fewer = talk.inbox(keys)
    fewer = msgspec.structs.replace(fewer, shares=fewer.shares[:2])
    talk.say(fewer)
    assert any("others than were told before" in one for one in dropped(caplog))
    assert talk.stage.pull(update) == payload


def test_a_share_that_cannot_be_opened_is_left_out_of_the_answer(talk):
    keys = talk.keys()
    talk.say(talk.group(keys))
    inbox = talk.inbox(keys)
    inbox.shares[1] = MaskShare(place=1, data=b"garbage")
    inbox.shares[2] = talk.peers[2].seals(keys, group="9-9")
    talk.say(inbox, polls=12)
    (reveal,) = talk.say(ask(), MaskReveal)
    assert [s.place for s in reveal.seeds] == [0, 3]


def test_it_masks_with_those_whose_shares_came_and_no_other(talk):
    keys = talk.keys()
    talk.say(talk.group(keys))
    inbox = talk.inbox(keys)
    update = talk.say(msgspec.structs.replace(inbox, shares=inbox.shares[:2]), UpdateReady, polls=12)[-1]
    numbers = read_numbers(talk.stage.pull(update), first_adapter(), GRID)
    other = numbers.copy()
    added(other, numbers, GRID, sign=-1)
    assert not other.any()
    (reveal,) = talk.say(ask((0, 1, 3)), MaskReveal)
    assert [s.place for s in reveal.seeds] == [0, 1, 3]


def test_secrets_lie_in_a_file_of_the_owner_and_are_gone_once_they_are_of_no_use(talk, tmp_path):
    path = tmp_path / NAME / "masks.bin"
    talk.to_update()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    talk.say(ask())
    after = msgspec.msgpack.decode(path.read_bytes()[32:])
    assert {after[name] for name in ("secret", "share_secret", "seed")} == {bytes(32)}
    assert msgspec.msgpack.decode(before[32:])["secret"] != bytes(32)
    talk.say(Finished(job="job", reason="done"))
    assert not path.exists()


def test_a_damaged_file_of_secrets_costs_its_round_and_no_more(talk, tmp_path, caplog):
    keys = talk.keys()
    path = tmp_path / NAME / "masks.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    talk.restart()
    assert "masks.bin: damaged" in caplog.text
    assert talk.keys() != keys


def test_an_offer_of_a_newer_task_makes_other_keys(talk):
    keys = talk.keys()
    talk.stage.aggregator.offer(2, work=msgspec.structs.replace(WORK, seed=2), grid=GRID, task_id="t-2")
    talk.stage.poll(6)
    other = talk.stage.aggregator.heard(MaskKeys)[-1]
    assert other.task_id == "t-2"
    assert not {keys.mask_key, keys.share_key, keys.seed_digest} & {
        other.mask_key,
        other.share_key,
        other.seed_digest,
    }


@pytest.mark.parametrize("codec", ["masked", "grid"])
def test_an_offer_without_a_grid_is_declined(talk, codec):
    said = talk.offer(work=msgspec.structs.replace(WORK, codec=codec), grid=SumGrid())
    (decline,) = [message for message in said if isinstance(message, Decline)]
    assert "grid of 0 bits" in decline.reason
    assert not [message for message in said if isinstance(message, MaskKeys)]


def test_numbers_that_are_not_finite_decline_the_task(tmp_path):
    def spoilt(training):
        training.adapter["w"][3] = np.nan
        return training

    talk = Talk(tmp_path, workbench=workbench_of(3, wrap=spoilt))
    keys = talk.keys()
    talk.say(talk.group(keys))
    (decline,) = talk.say(talk.inbox(keys), Decline, polls=12)
    assert "w: not finite" in decline.reason


def test_what_left_says_that_it_was_masked_and_a_tensor_that_stays_is_a_zero(tmp_path):
    talk = Talk(tmp_path, terms=Terms(least_samples=0, least_batch=0, least_effective=0, must_stay="w"))
    talk.to_update()
    assert b'"kind":"masked update"' in (tmp_path / NAME / "left.jsonl").read_bytes()


@pytest.mark.parametrize("terms", [None, Terms(least_effective=0)])
def test_noise_that_is_asked_for_is_added_before_the_grid(tmp_path, terms):
    clip, noise = 0.001, 3.0
    stage, grid = Stage(tmp_path, terms=terms), msgspec.structs.replace(GRID, limit=0.05, weight_bits=0)
    work = msgspec.structs.replace(WORK, codec="grid", most_norm=clip, noise=noise)
    update = stage.trained(1, work=work, grid=grid)
    moved = mean_change(
        read_numbers(stage.pull(update), first_adapter(), grid), first_adapter(), grid, num_devices=1
    )
    flat = np.concatenate([change.ravel() for change in moved.values()])
    assert abs(flat.std() / (clip * noise) - 1) < 10 / math.sqrt(2 * flat.size) + 0.01
    assert update.stats == {}


def test_few_samples_in_effect_decline_the_task_before_it_waits_for_masks(tmp_path):
    def few(training):
        training.effective_samples = 3.5
        return training

    talk = Talk(tmp_path, terms=Terms(least_effective=4), workbench=workbench_of(3, wrap=few))
    (decline,) = [message for message in talk.offer() if isinstance(message, Decline)]
    assert "least_effective: 3 asked for, 4 at least" in decline.reason


def test_of_a_trusted_key_a_question_that_is_said_again_gets_no_second_answer(tmp_path, caplog):
    talk = Talk(tmp_path)
    talk.stage = SignedStage(tmp_path / "signed")
    talk.to_update()
    aggregator = talk.stage.aggregator
    (reveal,) = talk.say(ask((0, 1, 3), (2,)), MaskReveal)
    topic, question = aggregator.said[-1]
    talk.stage.stranger.say(ask((0, 1, 2, 3)))
    talk.stage.poll(3)
    aggregator.status()
    aggregator.say(ask((0, 1, 2, 3)))
    talk.stage.poll(3)
    aggregator.again(topic, question)
    talk.stage.poll(3)
    assert aggregator.heard(MaskReveal) == []
    assert "MaskAsk is not signed" in caplog.text
    assert "it asks for other shares than before" in caplog.text
    assert "is older than message" in caplog.text
    talk.restart()
    aggregator.again(topic, question)
    talk.stage.poll(3)
    assert all(again == reveal for again in aggregator.heard(MaskReveal)), (
        "after a kill the very same at most"
    )


def test_without_the_package_the_word_says_what_to_install(talk, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"pip install 'fleetune\[trust\]'"):
        need_cryptography()
    (decline,) = [message for message in talk.offer() if isinstance(message, Decline)]
    assert "fleetune[trust]" in decline.reason
