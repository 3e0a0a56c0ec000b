"""How deep a device trains, as layer policies: what the configurators that choose depths have in common."""

import msgspec

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.jobs.work import device_work
from fleetune.broker.methods.choosing import Candidate
from fleetune.device_runtime.contracts.fields import SECONDS_MAX
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.device_runtime.errors import ConfigError

WAY_BACK = 2.0
"""What the way back through a layer costs, in ways there: gradients of input and of weights (CAFF's count of arithmetic)."""
SECONDS_MIN = 1e-6
"""No work takes less."""


def num_layers_of(settings: Settings) -> int:
    """Return the layers of the job's model; ConfigError where the job does not say."""
    if not (found := settings.num_layers):
        raise ConfigError(
            f"configurator {settings.configurator!r}: the job does not say how many layers there are"
        )
    return found


def suffix(depth: int, num_layers: int) -> PolicySpec:
    """All layers run, the uppermost ``depth`` train."""
    return PolicySpec(name="suffix", drop=(num_layers - depth) / num_layers)


def depth_of(policy: PolicySpec, num_layers: int) -> int:
    """Return the depth of a :func:`suffix`."""
    return round(num_layers * (1 - policy.drop))


def block(first: int, width: int) -> PolicySpec:
    """All layers run, ``width`` of them train, from layer ``first`` on."""
    return msgspec.structs.replace(PolicySpec(name="block"), first=first, width=width)


def assigned(settings: Settings, candidate: Candidate, **changes: object) -> LocalWork:
    """Return the job's work for a device, with its own seed and these fields changed."""
    work = device_work(settings, round_number=candidate.round, position=candidate.position)
    return msgspec.structs.replace(work, **changes)


def units(depth: int, num_layers: int) -> float:
    """What a step costs whose uppermost ``depth`` layers train, in layers run forward."""
    return num_layers + WAY_BACK * depth


def is_time(seconds: float) -> bool:
    """Whether a device can have needed so long; NaN is none."""
    return SECONDS_MIN <= seconds <= SECONDS_MAX
