"""FedCyBGD: each device trains one layer and sends that alone; from round to round it moves on to the next.

Source: "Save It All", arXiv 2406.11187, and its script: device i trains block i modulo their number, one device after the
other, each starting from what the one before it has made; blocks are overwritten. Ours: the devices of a round train at once,
and a block is averaged over those who trained it. A block low in the model saves upload, and no activations above it.
"""

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.methods.depths import assigned, block, num_layers_of


def fedcybgd() -> Configurator:
    """Choose layer (i + t) modulo their number for the device at place i in round t, both from 0."""

    def choose(settings: Settings, candidate: Candidate) -> Choice:
        layer = (candidate.position + candidate.round - 1) % num_layers_of(settings)
        return Choice(assigned(settings, candidate, policy=block(layer, 1)), f"layer {layer}, its turn")

    return Configurator(lambda settings: settings, choose, lambda settings, _: settings)
