"""Strategies: how a round's updates become the next version. The families are in files of their own, with their sources."""

from collections.abc import Callable

from fleetune.broker.methods.averaging import fedavg, fedavgm
from fleetune.broker.methods.hetlora import hetlora, rank_mean
from fleetune.broker.methods.lost import own_last, safari
from fleetune.broker.methods.product import product
from fleetune.broker.methods.robust import krum, median, multi_krum, trimmed
from fleetune.broker.methods.strategy import Strategy
from fleetune.device_runtime.tables import Table

STRATEGIES: Table[Callable[[], Strategy]] = Table(
    "strategy",
    {
        "fedavg": fedavg,
        "fedavgm": fedavgm,
        "product": product,
        "hetlora": hetlora,
        "rank-mean": rank_mean,
        "safari": safari,
        "own-last": own_last,
        "median": median,
        "trimmed": trimmed,
        "krum": krum,
        "multi-krum": multi_krum,
    },
)
OF_ALL = ("median", "trimmed", "krum", "multi-krum")
"""Those that a minority of wrong updates cannot move far; they have no weights, and no use for bounds on them."""
OF_RANKS = ("product", "hetlora", "rank-mean")
"""Those that take updates of fewer components than the version has; all others average whole tensors."""
