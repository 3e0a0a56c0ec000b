"""A spec of every layer policy, with whatever it needs; all that it uses is put to use."""

from fleetune.device_runtime.contracts.work import PolicySpec

_DRAWN = {
    "drop": 0.5,
    "shape": "incremental",
    "schedule": "falling",
    "horizon": 40,
    "protected": 1,
}
SPECS = (
    PolicySpec(name="full"),
    PolicySpec(name="head"),
    PolicySpec(name="bernoulli", **_DRAWN),
    PolicySpec(name="exact-k", **_DRAWN),
    PolicySpec(name="dropbp", **_DRAWN),
    PolicySpec(name="coto", **_DRAWN),
    PolicySpec(name="suffix", drop=0.5),
    PolicySpec(name="growing", drop=0.5, period=3, width=1),
    PolicySpec(name="block", width=1),
    PolicySpec(name="successive", drop=0.5, period=3),
    PolicySpec(name="cyclic", drop=0.5, period=3),
)
BY_NAME = {spec.name: spec for spec in SPECS}


def effects(num_layers: int) -> list[float]:
    """Made up: the second layer from below has the most, then the upper ones."""
    return [2.0 if layer == 1 else layer / num_layers for layer in range(num_layers)]
