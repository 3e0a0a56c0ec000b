"""Links of an optimizer, in optax's manner: each turns updates into updates, and :func:`chain` makes one of many.

Updates begin as gradients and end as what is added to the parameters. The loss is inside the exported graph, so what a method
adds to it that depends on the adapter alone (a penalty, a proximal term) is a link that adds the slope of that term. A tensor
that is not among the updates (its layer was dropped) is not among the results: nothing pulls at it, no state of it changes.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Floats

Tensors = dict[str, Floats]
"""Float32 by tensor name: updates or parameters."""


class Transform(NamedTuple):
    """A link. All state is one flat set of arrays, each entry ``slot`` or ``slot/tensor``; a link reads all and writes its own.

    ``init(params)`` gives the first entries; ``update(updates, state, params)`` gives new updates and the entries that changed.
    Both write to none of their arguments.
    """

    init: Callable[[Tensors], Arrays]
    update: Callable[[Tensors, Arrays, Tensors], tuple[Tensors, Arrays]]
    slots: tuple[str, ...] = ()


IDENTITY = Transform(lambda params: {}, lambda updates, state, params: (updates, {}))
"""Changes nothing; what a link is whose number is 0."""


def chain(*transforms: Transform) -> Transform:
    """Apply ``transforms`` in order, the first one to the gradients.

    Raises:
        ValueError: two of them keep state under one name.
    """
    slots = Counter(slot for transform in transforms for slot in transform.slots)
    if twice := [slot for slot, count in slots.items() if count > 1]:
        raise ValueError(f"chain: more than one link keeps {', '.join(twice)}; name their slots apart")

    def init(params: Tensors) -> Arrays:
        return {name: array for transform in transforms for name, array in transform.init(params).items()}

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        entries: Arrays = {}
        for transform in transforms:
            updates, changed = transform.update(updates, state, params)
            entries.update(changed)
        return updates, entries

    return Transform(init, update, tuple(slots))


def clip_by_norm(norm_max: float) -> Transform:
    """Scale all updates so that their joint L2 norm is at most ``norm_max``; 0 for no limit.

    Source: Pascanu, Mikolov and Bengio, arXiv 1211.5063; agrees with ``torch.nn.utils.clip_grad_norm_``.
    """

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        scale = np.float32(clip_scale(updates, norm_max))
        return {name: value * scale for name, value in updates.items()}, {}

    return IDENTITY._replace(update=update) if norm_max else IDENTITY


def clip_scale(updates: Mapping[str, Array], norm_max: float) -> float:
    """Tell what :func:`clip_by_norm` multiplies updates by."""
    if not norm_max:
        return 1.0
    norms = [
        float(np.linalg.norm(value.astype(np.float32, copy=False).ravel())) for value in updates.values()
    ]
    return min(1.0, norm_max / (float(np.linalg.norm(norms)) + 1e-6))


def regularise(slope: Callable[[Floats], Floats]) -> Transform:
    """Add a penalty's slope at the parameters, tensor by tensor: the slot of any regulariser of the adapter."""

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        return {name: value + slope(params[name]) for name, value in updates.items()}, {}

    return IDENTITY._replace(update=update)


def decay_weights(rate: float) -> Transform:
    """Add ``rate`` times the parameters: an L2 penalty before a scaling, decoupled weight decay after it.

    Source: Krogh and Hertz, NIPS 1991; decoupled: Loshchilov and Hutter, arXiv 1711.05101.
    """
    factor = np.float32(rate)

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        decayed = {name: params[name] * factor for name in updates}
        for name, value in updates.items():
            decayed[name] += value
        return decayed, {}

    return IDENTITY._replace(update=update) if rate else IDENTITY


def proximal(mu: float) -> Transform:
    """Add ``mu`` times the way from the parameters of ``init``: the slope of mu / 2 |w - w0|^2, w0 where the run began.

    Source: FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith), MLSys 2020, arXiv 1812.06127, equation 2.
    """
    factor = np.float32(mu)

    def init(params: Tensors) -> Arrays:
        return {f"anchor/{name}": value for name, value in params.items()}

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        pulls = {name: params[name] - cast("Floats", state[f"anchor/{name}"]) for name in updates}
        return {name: value + factor * pulls[name] for name, value in updates.items()}, {}

    return Transform(init, update, ("anchor",)) if mu else IDENTITY


def mask(masks: Mapping[str, Array]) -> Transform:
    """Multiply the updates of each tensor named by its mask of 0 and 1; others pass.

    First in a chain it hides gradients; last it keeps entries as they are, whatever the links before it do.

    Raises:
        ValueError: from ``init``: a mask of another shape than its tensor, or of none (all listed).

    Source: fixed sparse masks, Sung, Nair and Raffel, NeurIPS 2021, arXiv 2111.09839.
    """
    kept = {name: value.astype(np.float32) for name, value in masks.items()}

    def init(params: Tensors) -> Arrays:
        shapes = {name: getattr(params.get(name), "shape", "no tensor") for name in kept}
        wrong = [
            f"{name}: {kept[name].shape} for {shapes[name]}"
            for name in kept
            if kept[name].shape != shapes[name]
        ]
        if wrong:
            raise ValueError("mask: " + "; ".join(wrong))
        return {}

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        return {name: value * kept[name] if name in kept else value for name, value in updates.items()}, {}

    return Transform(init, update)


def momentum(decay: float) -> Transform:
    """Replace each update by the running sum ``decay * sum + update``, heavy-ball; 0 for none.

    Source: Polyak 1964; agrees with ``torch.optim.SGD``.
    """
    factor = np.float32(decay)

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        sums = {
            name: factor * _moment(state, f"momentum/{name}", value) + value
            for name, value in updates.items()
        }
        return sums, {f"momentum/{name}": value for name, value in sums.items()}

    return IDENTITY._replace(update=update, slots=("momentum",)) if decay else IDENTITY


def adam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Transform:
    """Divide the mean of each entry by the root of its mean square, both corrected for bias by the tensor's own step count.

    Source: Kingma and Ba, arXiv 1412.6980, the cheaper order of section 2; agrees with ``torch.optim.AdamW``.
    """
    keep1, keep2, take1, take2 = map(np.float32, (beta1, beta2, 1 - beta1, 1 - beta2))

    def one(grad: Floats, m: Floats, v: Floats, t: int) -> tuple[Floats, Floats, Floats]:
        m, v = m * keep1, v * keep2
        x = grad * take1
        m += x
        np.multiply(grad, grad, out=x)
        x *= take2
        v += x
        scale = math.sqrt(1 - beta2**t)
        np.sqrt(v, out=x)
        x += np.float32(eps * scale)
        np.divide(m, x, out=x)
        x *= np.float32(scale / (1 - beta1**t))
        return x, m, v

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        scaled: Tensors = {}
        entries: Arrays = {}
        for name, grad in updates.items():
            t = count(state.get(f"steps/{name}")) + 1
            m, v = _moment(state, f"m/{name}", grad), _moment(state, f"v/{name}", grad)
            scaled[name], m, v = one(grad, m, v, t)
            entries.update({f"steps/{name}": np.array([t], np.int64), f"m/{name}": m, f"v/{name}": v})
        return scaled, entries

    return IDENTITY._replace(update=update, slots=("steps", "m", "v"))


def descend(rate: Callable[[int], float]) -> Transform:
    """Multiply updates by minus the learning rate of this step, counted from 0; last but for masks."""

    def update(updates: Tensors, state: Arrays, params: Tensors) -> tuple[Tensors, Arrays]:
        step = count(state["step"])
        factor = np.float32(-rate(step))
        return {name: value * factor for name, value in updates.items()}, {
            "step": np.array([step + 1], np.int64)
        }

    return Transform(lambda params: {"step": np.zeros(1, np.int64)}, update, ("step",))


def count(counter: Array | None) -> int:
    """Read a count kept as int64 (1,); 0 if there is none."""
    return 0 if counter is None else int(counter.astype(np.int64)[0])


def _moment(state: Arrays, name: str, like: Floats) -> Floats:
    found = state.get(name)
    return np.zeros_like(like) if found is None else cast("Floats", found)
