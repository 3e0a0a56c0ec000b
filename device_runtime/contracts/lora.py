"""The low-rank pairs of an adapter by PEFT's names, and the part of them that some work trains and sends up.

A pair is A (r, in, …) and B (out, r, …) of one module, whose weight it changes by a multiple of B A. Component j is row j of A
and column j of B. What else learns (a head, DoRA's magnitudes, the bias of a B) belongs to no pair.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple
from zlib import crc32

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Indices
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.thresholds import stays, thresholds_of
from fleetune.device_runtime.contracts.work import LORA_A, THRESHOLDS, LocalWork
from fleetune.device_runtime.draws import Key, permutation

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
    """Return what ``work`` trains of an adapter and sends up: no frozen tensor, of each pair the components that learn.

    Those are the first ``work.rank``, and of them the ``drawn_rows``. Both ends pack and unpack an update against this part of
    its reference. Arrays are views where they are cut, copies where rows are drawn. Of work whose parameters stay on the device
    it is their thresholds, or nothing.
    """
    if stays(work):
        return thresholds_of(arrays) if work.mask == THRESHOLDS else {}
    frozen = frozen_names(arrays, work)
    part = {name: value for name, value in cut(arrays, work.rank).items() if name not in frozen}
    drawn = ((name, rows) for name, rows in drawn_rows(arrays, work).items() if name in part)
    return part | {name: part[name][place_of(name, rows)] for name, rows in drawn}


def drawn_rows(arrays: Mapping[str, Array], work: LocalWork) -> dict[str, Indices]:
    """Return which components learn under ``work.rows``, int64 ascending, by tensor; none of a pair that learns whole.

    The same for both tensors of a pair and for all devices of a round, as ``rows_seed``, the round and the name have it.

    Source: RM-LoRA, arXiv 2407.12074, masks the gradients of random components in each step ("v1": the same of A and B). Ours:
    one draw a round, shared by all, so that their averages meet; the update is masked, and only those components travel.
    """
    return dict(_drawn(arrays, work)) if work.rows else {}


def place_of(name: str, rows: Indices) -> tuple[slice | Indices, ...]:
    """Index of components in a tensor of a pair: rows of A, columns of B."""
    return (slice(None),) * _AXES[_end(name)] + (rows,)


def restored(after: Mapping[str, Array], before: Mapping[str, Array], rows: Mapping[str, Indices]) -> Arrays:
    """Return ``after`` with all components as in ``before`` but for those in ``rows``, in copies of the tensors named there."""
    found = dict(after)
    for name, drawn in rows.items():
        found[name] = before[name].copy()
        found[name][place_of(name, drawn)] = after[name][place_of(name, drawn)]
    return found


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
    asked = {f"frozen {work.frozen!r}": (bool(work.frozen), 0)}
    asked[f"mask {work.mask!r}"] = (work.mask == THRESHOLDS, 0)
    asked |= {
        f"{name} {count}": (count > 0, count) for name, count in (("rank", work.rank), ("rows", work.rows))
    }
    return [
        f"{what}: {said}"
        for what, (is_asked, count) in asked.items()
        if is_asked
        for said in _unfit(count, manifest)
    ]


def _drawn(arrays: Mapping[str, Array], work: LocalWork) -> Iterator[tuple[str, Indices]]:
    for pair in pairs_of(arrays):
        rank = min(rank_of(pair, arrays), work.rank or rank_of(pair, arrays))
        if work.rows < rank:
            key = Key(work.rows_seed, "rows", work.rounds_before, crc32(pair.a.encode()))
            rows = np.sort(permutation(key, rank)[: work.rows])
            yield from ((name, rows) for name in pair)


def _unfit(count: int, manifest: Manifest) -> list[str]:
    shapes = {row.name: row.shape for row in manifest.trainable}
    pairs = pairs_of(shapes)
    if not pairs:
        return ["the artifact has no LoRA pairs (lora_A with lora_B)"]
    if manifest.peft.get(_STACKED):
        return ["the artifact's pairs hold several matrices each (target_parameters)"]
    largest = max(shapes[pair.a][0] for pair in pairs)
    return [f"the artifact's LoRA has rank {largest}"] if count > largest else []


def _partner(name: str) -> str:
    end = _end(name)
    return name.removesuffix(end) + _SIDES[end] if end in _SIDES else ""


def _components(name: str, place: slice) -> tuple[slice, ...]:
    """Index of these components in a tensor of a pair."""
    return (slice(None),) * _AXES[_end(name)] + (place,)


def _end(name: str) -> str:
    """How the name of a tensor of a pair ends; empty for others."""
    return next((end for end in _AXES if name.endswith(end)), "")
