"""The work that a job gives each device of each round."""

from typing import Any

import msgspec

from fleetune.broker.jobs.settings import AUTO, FIXED, MASKS, ON_GRID, Job, Settings
from fleetune.device_runtime.contracts.class_means import ClassHead
from fleetune.device_runtime.contracts.work import (
    ADAPTER,
    CLASS_MEANS,
    GRID,
    MASKED,
    LocalWork,
    PolicySpec,
)
from fleetune.device_runtime.draws import Key, integers
from fleetune.device_runtime.errors import ConfigError

HELD_OUT = 0.1
"""Share of a device's samples that it measures on, unless the job says another."""
_EXACT = "xor"
"""The codec of class sums, whatever the job's: sums of classes that a device does not have, and bits that they do not have,
cost next to nothing."""
OF_DEVICES = (
    *("seed", "rounds_before", "rows_seed", "sums_bits", "most_norm", "noise"),
    *("sample_clip", "sample_noise", "sample_rate"),
)
"""Fields of the work that each device of each round gets of its own, or the job says elsewhere."""
SUMS_BITS, SUMS_BITS_OF_HALF, _HALF = 4, 10, 16
"""Bits of the significand of a class sum: in a job that packs up in few bits, and in one that packs in half precision."""
_NO_HEAD = ClassHead()
_CODECS = {ON_GRID: GRID, MASKS: MASKED}
"""Of a job's updates that are summed."""


def settings_of(
    job: Job,
    *,
    artifact: str,
    work: LocalWork,
    num_layers: int = 0,
    num_elements: int = 0,
    num_classes: int = 0,
    score: str = "",
    head: ClassHead = _NO_HEAD,
    still: tuple[str, ...] = (),
) -> Settings:
    """Join a job, the digest of its artifact, its sizes, its work, its head and its still tensors.

    ``min_clients`` 0 becomes all of ``clients``.

    Raises:
        ConfigError: ``work`` has what each device of each round gets of its own, or as of :func:`as_chosen`.
    """
    job, work = as_chosen(job, work)
    given = [name for name in OF_DEVICES if getattr(work, name)]
    given += ["learns"] if work.learns != ADAPTER else []
    if given:
        raise ConfigError(
            f"work: {' and '.join(given)} cannot be given; devices get their own, by the job's seed and round"
        )
    fields: dict[str, Any] = msgspec.structs.asdict(job) | {"min_clients": job.min_clients or job.clients}
    fields |= {"num_layers": num_layers, "num_elements": num_elements, "num_classes": num_classes}
    return Settings(**fields, artifact=artifact, work=work, head=head, still=still, score=score)


def as_chosen(job: Job, work: LocalWork) -> tuple[Job, LocalWork]:
    """Say policy ``auto`` as what it means, a configurator, and hold back what that measures on.

    Raises:
        ConfigError: policy ``auto`` is given settings, which it chooses itself, or another configurator.
    """
    if work.policy.name == AUTO:
        if work.policy != PolicySpec(name=AUTO):
            raise ConfigError("policy 'auto' chooses each device's policy with its settings; give none")
        if job.configurator not in (AUTO, FIXED):
            raise ConfigError(
                f"policy 'auto' is a configurator too, beside {job.configurator!r}; give one of them"
            )
        job = msgspec.structs.replace(job, configurator=AUTO)
        work = msgspec.structs.replace(work, policy=PolicySpec())
    if job.configurator == AUTO and not work.held_out:
        work = msgspec.structs.replace(work, held_out=HELD_OUT)
    return job, work


def device_work(settings: Settings, *, round_number: int, position: int) -> LocalWork:
    """Work of the device asked as number ``position`` (from 0) in a round (from 1), with a seed of its own.

    It says how many rounds came before, also to a device that was not asked in them: in a round all train the same layers.
    A round for the head does not count: after it a job draws as it would have without.
    """
    if round_number <= settings.head_rounds:
        return msgspec.structs.replace(
            settings.work,
            learns=CLASS_MEANS,
            codec=_EXACT,
            codec_ratio=0.0,
            codec_bits=0,
            sums_bits=_sums_bits(settings),
            seed=settings.seed,
        )
    trained = round_number - settings.head_rounds
    seed = device_seed(settings.seed, round_number=trained, position=position)
    shared = settings.seed if settings.work.rows else 0
    codec = _CODECS.get(settings.secure, settings.work.codec)
    work = msgspec.structs.replace(
        settings.work, codec=codec, seed=seed, rounds_before=trained - 1, rows_seed=shared
    )
    return settings.dp.asked(work, settings.min_clients)


def _sums_bits(settings: Settings) -> int:
    """Bits of the significand of a class sum: all where updates go up to the bit, few where they go in few."""
    if not settings.is_lossy_up:
        return 0
    is_half = settings.work.codec == "fp16" or settings.work.codec_bits == _HALF
    return SUMS_BITS_OF_HALF if is_half else SUMS_BITS


def device_seed(seed: int, *, round_number: int, position: int) -> int:
    """Draw a device's seed from the job's; the first device of the first round has the job's own.

    So one local run is one federated round. The others share no draw with those of a job whose seed is near.
    """
    if (round_number, position) == (1, 0):
        return seed
    return int(integers(Key(seed, "devices", round_number, position), 1)[0])
