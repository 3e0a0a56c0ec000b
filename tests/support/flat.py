"""``train``, ``device`` and ``aggregate`` with their options flat, as the command line has them."""

from fleetune.broker import aggregation
from fleetune.device_runtime.commands import device as devices
from fleetune.device_runtime.commands import train as training
from fleetune.device_runtime.terms.terms import Terms
from fleetune.toolkit.commands.options import AGGREGATE, DEVICE, TRAIN
from fleetune.toolkit.flags import claimed, structs_of

FEW_SAMPLES = Terms(least_effective=0)
"""Of a device whose data are too few for the default floor."""


def flat(parts, options):
    mine = claimed(parts)
    structs = structs_of({name: value for name, value in options.items() if name in mine}, parts)
    return {name: value for name, value in options.items() if name not in mine} | structs


def train(artifact, **options):
    return training.train(artifact, **flat(TRAIN, options))


def device(artifact, **options):
    """Its data are few: the floor of samples in effect is off, unless it is given."""
    options.setdefault("least_effective", 0)
    return devices.device(artifact, **flat(DEVICE, options))


def aggregate(artifact, **options):
    return aggregation.aggregate(artifact, **flat(AGGREGATE, options))
