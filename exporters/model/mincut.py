"""Which values to keep so that the rest can be made again: a minimum cut, the same for every kind of graph.

Source of the idea: AOTAutograd's min-cut rematerialisation in PyTorch.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import networkx as nx

NEVER = 1e18
"""Cost of a value that must not be kept."""
FREE = 1.0
"""Cost of a value that is held anyway."""


class Candidate(NamedTuple):
    """A value: bytes to keep it, what it is cheaply made of (None: it cannot be made again), and whether it is needed."""

    value: Hashable
    cost: float
    sources: tuple[Hashable, ...] | None
    needed: bool


def cheapest(candidates: Sequence[Candidate]) -> list[Hashable]:
    """The values to keep, in the order given, such that every needed one is kept or can be made of kept ones."""
    flow = nx.DiGraph()
    for value, cost, sources, needed in candidates:
        flow.add_edge((value, "in"), (value, "out"), capacity=cost)
        if sources is None:
            flow.add_edge("source", (value, "in"), capacity=NEVER)
        for source in sources or ():
            flow.add_edge((source, "out"), (value, "in"), capacity=NEVER)
        if needed:
            flow.add_edge((value, "out"), "sink", capacity=NEVER)
    if "sink" not in flow or "source" not in flow:
        return []
    _, (reachable, _rest) = nx.minimum_cut(flow, "source", "sink")
    return [c.value for c in candidates if (c.value, "in") in reachable and (c.value, "out") not in reachable]
