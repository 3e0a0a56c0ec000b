"""Configurators choose the work of each device, and may learn from what came of it."""

from collections.abc import Callable

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.jobs.work import device_work
from fleetune.broker.methods.auto import auto
from fleetune.broker.methods.caff import caff
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.methods.controls import random_depth, ranks
from fleetune.broker.methods.fedadapter import fedadapter
from fleetune.broker.methods.fedcybgd import fedcybgd
from fleetune.broker.methods.slt import slt
from fleetune.device_runtime.tables import Table

__all__ = ["CONFIGURATORS", "OF_LAYERS", "OF_RANK", "Candidate", "Choice", "Configurator", "fixed"]


def fixed() -> Configurator:
    """Give all devices the job's own work, each with a seed of its own."""

    def choose(settings: Settings, candidate: Candidate) -> Choice:
        return Choice(device_work(settings, round_number=candidate.round, position=candidate.position))

    return Configurator(lambda settings: settings, choose, lambda settings, _: settings)


CONFIGURATORS: Table[Callable[[], Configurator]] = Table(
    "configurator",
    {
        "fixed": fixed,
        "auto": auto,
        "caff": caff,
        "slt": slt,
        "fedcybgd": fedcybgd,
        "fedadapter": fedadapter,
        "random-depth": random_depth,
        "ranks": ranks,
    },
)
OF_LAYERS = ("caff", "slt", "fedcybgd", "fedadapter", "random-depth")
"""Those that choose which layers train: the job has no policy of its own."""
OF_RANK = ("ranks",)
"""Those that cannot do without the job's ``rank``."""
