"""The one place that holds an offer against the device's own contract: pure, before any of its work is begun."""

import math
from collections.abc import Collection, Iterator

from fleetune.device_runtime.contracts.accounting import sampling_problems
from fleetune.device_runtime.contracts.class_means import SUMS
from fleetune.device_runtime.contracts.work import ADAPTER, CLASS_MEANS, MASKED, LocalWork
from fleetune.device_runtime.errors import choices
from fleetune.device_runtime.options import problems
from fleetune.device_runtime.terms.behind import behind, num_used
from fleetune.device_runtime.terms.tensors import entries, may_leave
from fleetune.device_runtime.terms.terms import Terms


def objections(
    terms: Terms, work: LocalWork, *, role: str, num_samples: int, names: Collection[str]
) -> Iterator[str]:
    """Yield each limit that ``work`` does not keep, with what is asked for and what is allowed.

    Args:
        terms: the contract.
        work: what the aggregator asks for.
        role: of :data:`fleetune.device_runtime.contracts.wire.ROLES`.
        num_samples: rows of this device's data.
        names: tensors that the work trains.
    """
    if unlawful := problems(work):
        yield from unlawful
        return
    if impossible := [*sampling_problems(work)]:
        yield from impossible
        return
    batch = round(work.sample_rate * num_samples) if work.hides_samples else work.batch_size
    yield from _beyond("most_batch", batch, terms.most_batch)
    yield from _beyond("most_tokens", work.seq_len, terms.most_tokens)
    if role == "train":
        yield from _below("least_noise", work.noise if work.learns == ADAPTER else 0.0, terms.least_noise)
        if work.noise and not work.most_norm:
            yield "least_noise: noise is asked for without a norm that it is measured in"
    if terms.private_only and role == "train" and not work.hides_samples:
        yield "private_only: the work does not hide each sample"
    if terms.secure_only and role == "train" and work.codec != MASKED:
        yield "secure_only: the update would not be masked"
    if role != "train" or work.learns == CLASS_MEANS:
        yield from _below("least_samples", num_samples, terms.least_samples)
        if role == "train" and not may_leave(terms, [SUMS]):
            yield "may_leave: class sums are of the head, and may not leave"
        return
    used = num_used(work, num_samples, least_batch=terms.least_batch)
    found = behind(work, used)
    yield from _below("least_samples", found.samples, terms.least_samples)
    yield from beneath_effective(terms, found.samples)
    yield from _below("least_batch", found.batch, terms.least_batch)
    yield from _below("least_steps", found.steps, terms.least_steps)
    yield from _beyond("most_steps", found.steps, terms.most_steps)
    allowed = entries(terms.policies)
    if allowed and work.policy.name not in allowed:
        yield f"policies: asked for {work.policy.name}, allowed are {choices(allowed)}"
    if names and not may_leave(terms, names):
        yield "may_leave: no tensor that this work trains may leave"


def beneath_effective(terms: Terms, samples: float) -> Iterator[str]:
    """Yield why an update with so many samples behind it, in effect, may not leave."""
    whole = math.floor(samples) if math.isfinite(samples) else samples
    for said in _below("least_effective", whole, terms.least_effective):
        yield f"{said}; a lower --least-effective would allow it, and make texts easier to read out of an update"


def _below(limit: str, asked: float, least: float) -> Iterator[str]:
    if asked < least:
        yield f"{limit}: {_number(asked)} asked for, {_number(least)} at least ({_number(least - asked)} too few)"


def _beyond(limit: str, asked: float, most: float) -> Iterator[str]:
    if most and asked > most:
        yield f"{limit}: {_number(asked)} asked for, {_number(most)} at most ({_number(asked - most)} too many)"


def _number(value: float) -> str:
    return f"{value:,.15g}"
