"""What a job must keep to before it begins: all that the aggregator or a device would refuse later."""

from collections.abc import Collection, Iterator

from fleetune.broker.job import Patience, Settings
from fleetune.broker.methods.configurators import CONFIGURATORS
from fleetune.broker.methods.selection import SELECTIONS
from fleetune.broker.methods.strategies import STRATEGIES
from fleetune.device_runtime.contracts.codecs import make_codec
from fleetune.device_runtime.contracts.wire import FULL, check_name
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods import work as works
from fleetune.device_runtime.options import problems, refuse

TABLES: dict[str, Collection[str]] = {
    **works.TABLES,
    **{table.kind: table for table in (STRATEGIES, SELECTIONS, CONFIGURATORS)},
}
"""Where the names in a job and its work are looked up."""


def check_settings(
    settings: Settings, patience: Patience, *, num_layers: int, learning: int | None = None
) -> None:
    """Raise ConfigError that lists everything wrong; UnknownName for one unknown name.

    Args:
        settings: the job's.
        patience: the aggregator's.
        num_layers: of the model; devices would refuse work that does not suit it.
        learning: how many of them have an adapter; None for all.
    """
    check_name("job", settings.job)
    refuse([*_problems(settings, num_layers, learning), *problems(patience)])


def _problems(settings: Settings, num_layers: int, learning: int | None) -> Iterator[str]:
    found = problems(settings, TABLES)
    yield from found
    if not 1 <= settings.min_clients <= settings.clients:
        yield f"min_clients {settings.min_clients}: from 1 to clients ({settings.clients})"
    if not found:
        yield from _down_problems(settings)
    of_work = works.work_problems(settings.work, num_layers, learning=learning)
    yield from (said for said in of_work if said not in found)


def _down_problems(settings: Settings) -> Iterator[str]:
    if settings.down_codec == FULL:
        if settings.down_ratio:
            yield f"down_ratio {settings.down_ratio:g}: {FULL!r} has none"
        return
    try:
        make_codec(settings.down_codec, settings.down_ratio)
    except ConfigError as exc:
        yield str(exc)
