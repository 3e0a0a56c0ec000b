"""Policies that run every layer and train some that lie together.

``successive`` has its order from Successive Layer Training (Pfeiffer et al., NeurIPS 2023, github.com/k1l1/SLT), where the model
itself grows, from round to round; that the model is whole from the start, the adapters of equal groups are trained, and all
groups but the last get equally many steps, is ours. ``growing`` has its order from FedAdapter (Cai et al., MobiCom 2023, arXiv
2205.10162), which begins with few layers at the top and goes deeper; there trial groups of devices find the numbers, here the
spec has them.
``suffix``, ``cyclic`` and ``block`` are ours.
"""

from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, frozen
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.methods.policy import Policy
from fleetune.device_runtime.methods.shapes import num_kept


def suffix(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train the upper :func:`num_kept`: no backward below. Ours."""
    count = num_kept(num_layers, drop=spec.drop)
    return _still(num_layers, range(num_layers - count, num_layers))


def head(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train none: the head alone learns, and a hidden cache holds all that is below it. Ours, as a control."""
    plan = frozen(num_layers)
    return lambda step, draws, state: plan


def block(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train ``width`` from ``first`` on. Ours."""
    return _still(num_layers, range(spec.first, spec.first + spec.width))


def successive(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train one group of :func:`num_kept`: ``period`` steps each of :func:`layer_groups`, the last for good."""
    plans = _group_plans(num_layers, spec)
    return lambda step, draws, state: plans[min(step // spec.period, len(plans) - 1)]


def cyclic(num_layers: int, spec: PolicySpec) -> Policy:
    """Train as ``successive`` does, and after the last group the first again. Ours."""
    plans = _group_plans(num_layers, spec)
    return lambda step, draws, state: plans[step // spec.period % len(plans)]


def growing(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train the topmost ``width``, and ``width`` more after every ``period`` steps, up to :func:`num_kept`.

    Source of the order: FedAdapter, arXiv 2205.10162.
    """
    most = num_kept(num_layers, drop=spec.drop)
    counts = [*range(spec.width, most, spec.width), most]
    plans = [_training(num_layers, range(num_layers - count, num_layers)) for count in counts]
    return lambda step, draws, state: plans[min(step // spec.period, len(plans) - 1)]


def layer_groups(num_layers: int, *, size: int) -> list[range]:
    """Cut layers into groups of ``size``, lowest first; the last ends with the topmost layer, overlapping if it must."""
    last = num_layers - size
    return [range(first, first + size) for first in (*range(0, last, size), last)]


def _group_plans(num_layers: int, spec: PolicySpec) -> list[LayerPlan]:
    groups = layer_groups(num_layers, size=num_kept(num_layers, drop=spec.drop))
    return [_training(num_layers, group) for group in groups]


def _still(num_layers: int, trained: range) -> Policy:
    plan = _training(num_layers, trained)
    return lambda step, draws, state: plan


def _training(num_layers: int, trained: range) -> LayerPlan:
    return tuple(Mode.TRAIN if i in trained else Mode.FORWARD for i in range(num_layers))
