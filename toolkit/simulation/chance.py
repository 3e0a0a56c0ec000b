"""Draws of the simulator: one generator for each purpose and place, so that no order of calls changes a draw.

Equal on every machine with the same numpy; another numpy may draw otherwise (its Generator promises no more). What devices and
aggregator draw is in ``fleetune.device_runtime.draws``, and is the same in every language.
"""

import numpy as np

_PURPOSES = ("partition", "profiles", "limit", "network", "dropout", "pause", "absence")
"""In an order that stays: the place is part of the key."""


def chance(seed: int, purpose: str, *places: int) -> np.random.Generator:
    """Make the generator for a purpose at a place, as (device, round)."""
    key = np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), *places))
    return np.random.Generator(np.random.PCG64(key))
