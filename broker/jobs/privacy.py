"""Differential privacy of a job: where the noise is added, and how much is spent."""

import math
from typing import Annotated

import msgspec

from fleetune.device_runtime.contracts.work import (
    LocalWork,
)
from fleetune.device_runtime.options import Option

NO_PRIVACY, CENTRAL, DISTRIBUTED, LOCAL, SAMPLE = PRIVACIES = (
    *("none", "central", "distributed", "local"),
    "sample",
)
"""Where the noise of differential privacy is added; with the last one in each step of each device."""
_NOISE_MAX = 1e6


class Privacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Differential privacy: what a job's versions may tell of any one device, or of any one sample of a device."""

    name: Annotated[
        str,
        Option(
            "where noise hides what one device adds: at the aggregator, in the shares of a round's devices together, or in "
            "each device's own update; sample: in each step, where it hides what one sample adds",
            table="dp",
        ),
    ] = NO_PRIVACY
    clip: Annotated[
        float,
        Option(
            "with dp: L2 norm of the change of one update, or of one sample's gradient, at most",
            at_least=0,
            at_most=_NOISE_MAX,
        ),
    ] = 0.0
    noise: Annotated[
        float,
        Option("with dp: standard deviation of the noise, in clip", at_least=0, at_most=_NOISE_MAX),
    ] = 0.0
    sample_rate: Annotated[
        float,
        Option(
            "dp sample: chance of each sample to be in a step, in place of batch_size", at_least=0, at_most=1
        ),
    ] = 0.0
    delta: Annotated[
        float,
        Option(
            "with dp: chance that epsilon does not hold; less than 1 in so many devices, or samples",
            above=0,
            below=1,
        ),
    ] = 1e-5
    most_epsilon: Annotated[
        float,
        Option(
            "with dp: a device whose next round would exceed this is asked no more, and the job ends when too few are left; "
            "0 for no limit",
            at_least=0,
            at_most=_NOISE_MAX,
        ),
    ] = 0.0

    @property
    def is_on(self) -> bool:
        """Whether there is any."""
        return self.name != NO_PRIVACY

    @property
    def of_samples(self) -> bool:
        """Whether each sample of a device is hidden, and not the device."""
        return self.name == SAMPLE

    @property
    def of_devices(self) -> bool:
        """Whether each device is hidden, with all of its samples."""
        return self.is_on and not self.of_samples

    @property
    def is_central(self) -> bool:
        """Whether the aggregator adds the noise."""
        return self.name == CENTRAL

    def device_noise(self, min_clients: int) -> float:
        """Noise that each device adds, in ``clip``: all of it, its share of it where so many are together, or none."""
        if self.name == LOCAL:
            return self.noise
        return self.noise / math.sqrt(max(1, min_clients)) if self.name == DISTRIBUTED else 0.0

    def asked(self, work: LocalWork, min_clients: int) -> LocalWork:
        """Say in ``work`` what a device has to do for it."""
        if self.of_samples:
            return msgspec.structs.replace(
                work, sample_clip=self.clip, sample_noise=self.noise, sample_rate=self.sample_rate
            )
        return msgspec.structs.replace(work, most_norm=self.clip, noise=self.device_noise(min_clients))
