"""The low-rank pairs of an adapter by PEFT's names, and the part of them that some work trains and sends up.

A pair is A (r, in, …) and B (out, r, …) of one module, whose weight it changes by a multiple of B A. Component j is row j of A
and column j of B. What else learns (a head, DoRA's magnitudes, the bias of a B) belongs to no pair.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.wire import LORA_A, LocalWork

_SIDES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_AXES = {**dict.fromkeys(_SIDES, 0), **dict.fromkeys(_SIDES.values(), 1)}
"""Axis along which a tensor's components lie, by the end of its name."""
_DRAWN_A = ".lora_A.weight"
"""Of an embedding it is B that is drawn, and A that begins with zeros: neither is ever frozen."""
_STACKED = "target_parameters"
"""PEFT's setting for modules of several matrices, such as experts: a pair of theirs holds the components of all in one."""


class Pair(NamedTuple):
    """Names of the two tensors of one module."""

    a: str
    b: str


def pairs_of(names: Iterable[str]) -> tuple[Pair, ...]:
    """Return the pairs among tensors, in the order of their A's."""
    known = dict.fromkeys(names)
    found = ((name, _partner(name)) for name in known)
    return tuple(Pair(a, b) for a, b in found if b in known)


def rank_of(pair: Pair, arrays: Mapping[str, Array]) -> int:
    """Return the components of a pair in ``arrays``, by whichever of its tensors is there; 0 if neither is."""
    if pair.a in arrays:
        return int(arrays[pair.a].shape[0])
    return int(arrays[pair.b].shape[1]) if pair.b in arrays else 0


def trained_part(arrays: Mapping[str, Array], work: LocalWork) -> Arrays:
    """Return what ``work`` trains of an adapter and sends up: no frozen tensor, of each pair the first ``work.rank`` components.

    Both ends pack and unpack an update against this part of its reference. Arrays are views where they are cut.
    """
    frozen = frozen_names(arrays, work)
    return {name: value for name, value in cut(arrays, work.rank).items() if name not in frozen}


def frozen_names(names: Iterable[str], work: LocalWork) -> frozenset[str]:
    """Return the tensors that ``work`` leaves as they are: with ``frozen`` "lora-a" every A that is drawn at the start."""
    if work.frozen != LORA_A:
        return frozenset()
    return frozenset(pair.a for pair in pairs_of(names) if pair.a.endswith(_DRAWN_A))


def cut(arrays: Mapping[str, Array], rank: int) -> Arrays:
    """Return ``arrays`` with the first ``rank`` components of each pair, as views; 0 for all."""
    found = dict(arrays)
    for name in filter(_end, arrays) if rank else ():
        found[name] = arrays[name][_components(name, slice(rank))]
    return found


def truncated(arrays: Mapping[str, Array], rank: int) -> Arrays:
    """Return ``arrays`` with zeros beyond the first ``rank`` components of each pair, shapes as they are; 0 for all."""
    found = dict(arrays)
    for name in filter(_end, arrays) if rank else ():
        found[name] = arrays[name].copy()
        found[name][_components(name, slice(rank, None))] = 0
    return found


def lora_problems(work: LocalWork, manifest: Manifest) -> list[str]:
    """Return what keeps an artifact's adapter from being trained in part, as ``work`` asks for it."""
    asked = {f"frozen {work.frozen!r}": bool(work.frozen), f"rank {work.rank}": work.rank > 0}
    return [
        f"{what}: {said}" for what, is_asked in asked.items() if is_asked for said in _unfit(work, manifest)
    ]


def _unfit(work: LocalWork, manifest: Manifest) -> list[str]:
    shapes = {row.name: row.shape for row in manifest.trainable}
    pairs = pairs_of(shapes)
    if not pairs:
        return ["the artifact has no LoRA pairs (lora_A with lora_B)"]
    if manifest.peft.get(_STACKED):
        return ["the artifact's pairs hold several matrices each (target_parameters)"]
    largest = max(shapes[pair.a][0] for pair in pairs)
    return [f"the artifact's LoRA has rank {largest}"] if work.rank > largest else []


def _partner(name: str) -> str:
    end = _end(name)
    return name.removesuffix(end) + _SIDES[end] if end in _SIDES else ""


def _components(name: str, place: slice) -> tuple[slice, ...]:
    """Index of these components in a tensor of a pair."""
    return (slice(None),) * _AXES[_end(name)] + (place,)


def _end(name: str) -> str:
    """How the name of a tensor of a pair ends; empty for others."""
    return next((end for end in _AXES if name.endswith(end)), "")
