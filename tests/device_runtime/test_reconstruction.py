"""The attack of an aggregator that reads a text out of one device's update, and the contract that declines it.

With every LoRA-like branch switched off the tiny model's features are the mean of a text's embeddings; with a head of zeros the
head's gradient is (1/C - y) x feature, so one step on one sample gives label, feature, and from that the words.
"""

from collections import Counter

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file
from stage import Stage
from words import GROUPS

from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.contracts.mask_messages import (
    MaskGroup,
    MaskInbox,
    MaskKeys,
    MaskPeer,
    MaskShare,
)
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.secure_sums.grid import modulus_bits, read_numbers
from fleetune.device_runtime.contracts.secure_sums.keys import new_secret, public_of
from fleetune.device_runtime.contracts.wire import Decline, Request, UpdateReady, Verdict
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, SumGrid
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.terms.terms import Terms
from fleetune.device_runtime.training.machine import Machine

WORDS = ["[UNK]", *" ".join(GROUPS).split()]
NOBODYS, STEEP = 4, 1e4
ONE = LocalWork(steps=1, batch_size=1, seq_len=8, optimizer=OptimizerSpec(name="sgd", lr=1.0))


@pytest.fixture(scope="module")
def lines(word_file):
    return [line.split(",") for line in word_file.read_text().split("\n")[1:] if line]


@pytest.fixture(scope="module")
def machine(word_artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with Machine(open_artifact(word_artifact), Resources(threads=1), folder=folder) as found:
        yield found


@pytest.fixture
def attacked(machine, word_artifact, word_file, tmp_path):
    artifact = open_artifact(word_artifact)
    data = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=8)

    def stage(terms):
        bench = Workbench(lambda work, held: machine.trainer(data, work, held), None, data.num_samples)
        options = {
            "workbench": bench,
            "adapter": FirstAdapter.of(artifact.adapter()),
            "artifact": artifact.digest,
        }
        return Stage(tmp_path, terms=terms, **options)  # fmt: skip

    return stage


def bait(word_artifact):
    adapter = open_artifact(word_artifact).adapter()
    return {n: np.zeros_like(a) if n.startswith("head") or ".up." in n else a for n, a in adapter.items()}


def read(values, adapter, word_artifact):
    """Label, and the share of each word in the text, of the one sample behind an update."""
    bias = adapter["head.bias"] - values["head.bias"].astype(float)
    weight = adapter["head.weight"] - values["head.weight"].astype(float)
    label = int(bias.argmin())
    embeddings = load_file(word_artifact / "base.safetensors")["embed.weight"][: len(WORDS)].astype(float)
    shares, *_ = np.linalg.lstsq(embeddings.T, weight[label] / bias[label], rcond=None)
    return "abcde"[label], shares


def offered(stage, number, work, adapter):
    """What the device says to an offer of this work from an adapter, which it fetches where it does not hold it."""
    stage.aggregator.offer(number, adapter=adapter, work=work)
    stage.poll(2)
    said = stage.aggregator.heard()
    for request in [message for message in said if isinstance(message, Request)]:
        for chunk in stage.aggregator.outgoing.chunks(request):
            stage.aggregator.say(chunk)
    stage.poll(8 + work.steps)
    return [*said, *stage.aggregator.heard()]


def is_read(stage, number, work, lines, word_artifact):
    adapter = bait(word_artifact)
    values = answered(stage, number, msgspec.structs.replace(work, seed=number), adapter)
    label, shares = read(values, adapter, word_artifact)
    texts = [text.split() for text, of in lines if of == label]
    wanted = [[Counter(words)[word] / len(words) for word in WORDS] for words in texts]
    return any(np.allclose(shares, one, atol=1e-3) for one in wanted)


def all_rows_but_few_silent(word_artifact):
    """Bait with a label nobody has, to which only those few answer whose features go far in one direction."""
    adapter = bait(word_artifact)
    embeddings = load_file(word_artifact / "base.safetensors")["embed.weight"][1 : len(WORDS)]
    direction = embeddings[0] / np.linalg.norm(embeddings[0])
    adapter["head.weight"][NOBODYS] = STEEP * direction
    adapter["head.bias"][NOBODYS] = -STEEP * 0.999 * (embeddings @ direction).max()
    return adapter


def baits(word_artifact, count):
    for seed in range(count):
        weight = np.random.default_rng(seed).normal(0, 1, bait(word_artifact)["head.weight"].shape)
        yield {**bait(word_artifact), "head.weight": weight.astype(np.float32)}


def answered(stage, number, work, adapter):
    """The update to an offer of this work from this adapter, or the reason of the one declining."""
    said = offered(stage, number, work, adapter)
    if declines := [message for message in said if isinstance(message, Decline)]:
        return declines[0].reason
    update = [message for message in said if isinstance(message, UpdateReady)][-1]
    values = {**adapter, **decode_update(stage.pull(update), adapter)}
    stage.aggregator.verdict(update)
    stage.poll()
    return values


def texts_in_span(rows, lines, word_artifact):
    """The texts whose features lie in the span of the head's gradients."""
    embeddings = load_file(word_artifact / "base.safetensors")["embed.weight"][: len(WORDS)].astype(float)
    _, sizes, directions = np.linalg.svd(
        rows / np.linalg.norm(rows, axis=1, keepdims=True), full_matrices=False
    )
    directions = directions[sizes > 1e-5 * sizes[0]]
    counts = np.array([[Counter(text.split())[word] for word in WORDS] for text, _ in lines])
    features = counts @ embeddings
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    outside = np.linalg.norm(features - features @ directions.T @ directions, axis=1)
    return {text for (text, _), far in zip(lines, outside, strict=True) if far < 1e-4}


def patiently_read(stage, lines, word_artifact, *, work, offers):
    """Offer the same samples with other bait, again and again; the texts that the answers span, and the refusals."""
    rows, reasons = [], []
    for number, adapter in enumerate(baits(word_artifact, offers), 1):
        found = answered(stage, number, work, adapter)
        if isinstance(found, str):
            reasons.append(found)
        else:
            rows.append(adapter["head.weight"].astype(float) - found["head.weight"])
    return (texts_in_span(np.concatenate(rows), lines, word_artifact) if rows else set()), reasons


def test_without_a_contract_every_text_is_read(attacked, lines, word_artifact):
    stage = attacked(None)
    assert all(is_read(stage, number, ONE, lines, word_artifact) for number in range(1, 11))


def test_under_the_defaults_the_offer_is_declined_and_nothing_leaves(attacked, word_artifact):
    stage = attacked(Terms())
    said = offered(stage, 1, ONE, bait(word_artifact))
    (decline,) = [message for message in said if isinstance(message, Decline)]
    assert "least_samples: 1 asked for, 8 at least (7 too few)" in decline.reason
    assert "least_batch: 1 asked for, 4 at least (3 too few)" in decline.reason
    assert stage.device.outbox.pending() == []


def test_the_smallest_work_that_the_floors_on_counts_allow_gives_no_text_at_once(
    attacked, lines, word_artifact
):
    stage, least = attacked(Terms(least_effective=0)), msgspec.structs.replace(ONE, batch_size=4, steps=2)
    assert not any(is_read(stage, number, least, lines, word_artifact) for number in range(1, 11))


def test_an_aggregator_that_is_patient_reads_the_same_few_samples_where_counts_alone_are_held(
    attacked, lines, word_artifact
):
    few = msgspec.structs.replace(ONE, batch_size=8)
    found, reasons = patiently_read(
        attacked(Terms(least_effective=0)), lines, word_artifact, work=few, offers=4
    )
    assert not reasons
    assert len(found) >= 6
    assert len(found) < 40, "the span holds what was asked for, not all there is"


def test_under_the_defaults_patience_reads_nothing(attacked, lines, word_artifact):
    few = msgspec.structs.replace(ONE, batch_size=8)
    found, reasons = patiently_read(attacked(Terms()), lines, word_artifact, work=few, offers=4)
    assert len(reasons) == 4
    assert "least_effective: 8 asked for, 32 at least" in reasons[0]
    assert not found


@pytest.mark.parametrize("optimizer", [
    {"lr": 1.0, "weight_decay": 1.0},
    {"lr": 1.0, "proximal": 1.0},
])  # fmt: skip
def test_steps_that_erase_those_before_do_not_make_many_samples(attacked, word_artifact, optimizer):
    spec = OptimizerSpec(name="sgd", **optimizer)
    work = msgspec.structs.replace(ONE, batch_size=8, steps=15, optimizer=spec)
    adapter = next(baits(word_artifact, 1))
    assert "least_effective" in answered(attacked(Terms()), 1, work, adapter)


def test_an_adapter_that_lets_few_samples_speak_is_found_out_once_they_have(attacked, word_artifact):
    """All 120 rows in one step: by count that is enough."""
    work, hook = msgspec.structs.replace(ONE, batch_size=120), all_rows_but_few_silent(word_artifact)
    stage = attacked(Terms())
    assert "least_effective" in answered(stage, 1, work, hook)
    assert stage.device.outbox.pending() == []


def test_ordinary_work_passes_under_the_defaults(attacked, word_artifact):
    work = LocalWork(batch_size=16, seq_len=8, seed=1)
    adapter = open_artifact(word_artifact).adapter()
    assert isinstance(answered(attacked(Terms()), 1, work, adapter), dict)


def test_of_a_masked_update_there_is_nothing_to_read(attacked, lines, word_artifact):
    """Without any contract, of one step on one sample: what the aggregator pulls are numbers of which each is as likely."""
    stage, adapter = attacked(None), bait(word_artifact)
    grid = SumGrid(bits=16, weight_bits=4, summands=3, limit=2.0)
    peers = [
        MaskPeer(
            place=i, device_id=f"p{i}", mask_key=public_of(new_secret()), share_key=public_of(new_secret())
        )
        for i in range(2)
    ]
    read_lines = 0
    for number in range(1, 11):
        header = {"job": "job", "task_id": f"t-{number}", "round": number}
        work = msgspec.structs.replace(ONE, codec="masked", seed=number)
        stage.aggregator.offer(number, adapter=adapter, work=work, grid=grid, task_id=f"t-{number}")
        stage.poll(4)
        said = stage.aggregator.heard()
        for request in [message for message in said if isinstance(message, Request)]:
            for chunk in stage.aggregator.outgoing.chunks(request):
                stage.aggregator.say(chunk)
        keys = next(message for message in said if isinstance(message, MaskKeys))
        group = {"group": f"{number}-0", "place": 2, "mask_key": keys.mask_key, "threshold": 2}
        stage.aggregator.say(MaskGroup(**header, **group, peers=peers))
        shares = [MaskShare(place=i, data=bytes(82)) for i in range(2)]
        stage.aggregator.say(MaskInbox(**header, group=f"{number}-0", shares=shares))
        stage.poll(12)
        update = [message for message in stage.aggregator.heard() if isinstance(message, UpdateReady)][-1]
        numbers = read_numbers(stage.pull(update), adapter, grid)
        change = _as_seen(numbers, adapter, grid)
        label, found = read({n: adapter[n] + change[n] for n in adapter}, adapter, word_artifact)
        texts = [text.split() for text, of in lines if of == label]
        wanted = [[Counter(words)[word] / len(words) for word in WORDS] for words in texts]
        read_lines += any(np.allclose(found, one, atol=1e-1) for one in wanted)
        stage.aggregator.say(
            Verdict(
                job="job", task_id=f"t-{number}", round=number, digest=update.payload.sha256, accepted=True
            )
        )
        stage.poll()
    assert read_lines == 0


def _as_seen(numbers, adapter, grid):
    """The numbers as changes, as an aggregator would read them that took the masks for nothing."""
    modulus = 2.0 ** modulus_bits(grid)
    centred = (numbers[:-1].astype(float) + modulus / 2) % modulus - modulus / 2
    flat, start, found = centred * grid.limit / 2 ** (grid.bits - 1), 0, {}
    for name in sorted(adapter):
        found[name] = flat[start : start + adapter[name].size].reshape(adapter[name].shape)
        start += adapter[name].size
    return found
