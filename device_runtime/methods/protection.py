"""Which layers are never dropped: the outermost, or those whose absence tells most in the model's answer.

Sentence encoders do most of their work in their last layers and little in the middle (measured with MiniLM and bge-small,
``docs/lab.md``); a layer's own change of the hidden stream (block influence, ShortGPT, arXiv 2403.03853) does not show that.
"""

from collections.abc import Sequence

from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.policy import PolicyState

EFFECTS = "effects"
"""Key in a policy's state: the skip effect of each layer, a list of floats, as ``training/skip_effects`` measures it."""


def needs_effects(spec: PolicySpec) -> bool:
    """Whether the state must hold effects before the first step."""
    return spec.protected > 0 and spec.protect == "effect"


def protected_layers(
    num_layers: int, spec: PolicySpec, state: PolicyState, *, lowest: int = 0
) -> tuple[int, ...]:
    """The layers from ``lowest`` on that are never dropped, lowest first.

    Raises:
        ConfigError: effects are asked for, and the state does not hold one for each layer.
    """
    order = outermost(lowest, num_layers)
    if needs_effects(spec):
        effects = _effects(num_layers, spec, state)
        order = sorted(order, key=lambda layer: -effects[layer])  # equal ones stay outermost first
    return tuple(sorted(order[: spec.protected]))


def outermost(lowest: int, num_layers: int) -> list[int]:
    """The layers from ``lowest`` on, from the ends to the middle: last, first, last but one, second."""
    count = num_layers - lowest
    return [lowest + i // 2 if i % 2 else num_layers - 1 - i // 2 for i in range(count)]


def _effects(num_layers: int, spec: PolicySpec, state: PolicyState) -> Sequence[float]:
    found: Sequence[float] = state.get(EFFECTS, ())
    if len(found) != num_layers:
        raise ConfigError(
            f"layer policy {spec.name!r} protects layers by their effect: {len(found)} measured, of {num_layers} layers"
        )
    return found
