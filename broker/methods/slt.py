"""Successive layer training: one group of layers after another trains for some rounds, from the lowest up.

Source: Pfeiffer, Khalili and Henkel, NeurIPS 2023, github.com/k1l1/SLT: in stage n the layers below are frozen, one trains at
full width, those above are narrowed so that a stage fits the memory, and the head trains always; stages are as long as they
have parameters. Ours: a pretrained model is not narrowed: the layers above run whole and frozen, so that a stage near the
bottom saves nothing on the way back. Stages are equally long, as equal layers have equally many parameters; there are no more
stages than rounds.
"""

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.methods.depths import assigned, block, num_layers_of


def slt() -> Configurator:
    """Choose the group of the round, the same for all devices; what flows into it may be kept by devices with a hidden cache."""

    def choose(settings: Settings, candidate: Candidate) -> Choice:
        stages, first, width = stage(settings, candidate.round)
        work = assigned(settings, candidate, policy=block(first, width), cache_below=first)
        return Choice(work, f"stage {first // width + 1} of {stages}: layers {first} to {first + width - 1}")

    return Configurator(lambda settings: settings, choose, lambda settings, _: settings)


def stage(settings: Settings, round_number: int) -> tuple[int, int, int]:
    """Return the number of stages, and the lowest layer and the number of layers of the stage that a round is in."""
    num_layers = num_layers_of(settings)
    width = -(-num_layers // min(settings.rounds, num_layers))
    stages = -(-num_layers // width)
    number = min((round_number - 1) * stages // settings.rounds, stages - 1)
    return stages, number * width, min(width, num_layers - number * width)
