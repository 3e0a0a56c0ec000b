"""Controls: choices that know nothing, to tell what another configurator's knowledge is worth."""

from zlib import crc32

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.methods.depths import assigned, num_layers_of, suffix
from fleetune.device_runtime.draws import Key, integers


def random_depth() -> Configurator:
    """Train a suffix of a depth drawn for each device of each round, every depth as likely as another. Ours."""

    def choose(settings: Settings, candidate: Candidate) -> Choice:
        num_layers = num_layers_of(settings)
        key = Key(settings.seed, "configurator", candidate.round, candidate.position)
        depth = 1 + int(integers(key, 1)[0]) % num_layers
        return Choice(
            assigned(settings, candidate, policy=suffix(depth, num_layers)),
            f"{depth} of {num_layers} layers: drawn",
        )

    return Configurator(lambda settings: settings, choose, lambda settings, _: settings)


def ranks() -> Configurator:
    """Give each device one rank for good, drawn by its id from the job's ``rank``, half of it, a quarter, and so on to 1.

    HetLoRA (arXiv 2401.06432) gives weak devices low ranks; here nothing is known of them. Ours.
    """

    def choose(settings: Settings, candidate: Candidate) -> Choice:
        rungs = halved(settings.work.rank)
        key = Key(settings.seed, "configurator", crc32(candidate.device_id.encode()))
        rank = rungs[int(integers(key, 1)[0]) % len(rungs)]
        return Choice(assigned(settings, candidate, rank=rank), f"rank {rank} of {rungs[0]}: drawn by its id")

    return Configurator(lambda settings: settings, choose, lambda settings, _: settings)


def halved(rank: int) -> list[int]:
    """Return a rank, half of it, a quarter, and so on down to 1."""
    return [rank >> i for i in range(max(rank, 1).bit_length())]
