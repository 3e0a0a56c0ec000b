"""From the bytes of updates to the next version: how many of them a second, beside numpy's float64 tensor by tensor.

An update is unpacked, looked over and added to exact sums; at the end of a round the mean is taken. numpy does the same without
exact sums, over values that it need not unpack. Speed is of the processor's time in one thread, in MB (10**6 bytes) of the
payload; everybody takes turns, and a figure is the median of the repeats. The process keeps freed memory as an aggregator's does.
"""

import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring.figures import chart_of, medians, ratio, table
from fleetune.broker.heap import keep_freed
from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.strategy import Strategy, Update
from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.codecs import Codec, make_codec, pack, unpack
from fleetune.device_runtime.errors import UnknownName, choices

REPEATS = 5
CODECS = ("fp32", "fp16", "int8")
_DRAWN = 4
"""Different updates of a round, which come again and again."""
_PRODUCT, _NUMPY = "fleetune", "numpy"
Say = Callable[[str], None]


class _Size(NamedTuple):
    num_tensors: int
    shape: tuple[int, int]
    num_updates: int
    """Of a round."""


SIZES = {
    "0.3": _Size(26, (8, 384), 100),
    "3": _Size(48, (16, 1024), 30),
    "50": _Size(336, (16, 2325), 6),
}
"""By the MB of float32."""


class _Round(NamedTuple):
    codec: Codec
    reference: Arrays
    payloads: Sequence[bytes]
    tensors: Sequence[Mapping[str, Array]]
    """What numpy adds, float32."""
    num_updates: int


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS) -> dict[str, Any]:
    """One row per size and codec; ``only`` names sizes in MB, or codecs."""
    keep_freed()
    known = (*SIZES, *CODECS)
    if unknown := [name for name in only if name not in known]:
        raise UnknownName(f"no size or codec {unknown[0]!r}; have: {choices(known)}")
    rows = []
    for size in [name for name in SIZES if name in only] or SIZES:
        for codec in [name for name in CODECS if name in only] or CODECS:
            rows.append({"update": f"{size} MB {codec}", **_row(_drawn(SIZES[size], codec), repeats)})
            say(f"{rows[-1]['update']}: {rows[-1]['fleetune_mb_s']:.0f} MB/s")
    for line in table(rows):
        say(line)
    return {
        "benchmark": "merge",
        "rows": rows,
        "chart": chart_of("update", rows, "fleetune_mb_s", "numpy_mb_s"),
    }


def _drawn(size: _Size, codec: str, seed: int = 0) -> _Round:
    rng, made = np.random.default_rng(seed), make_codec(codec)
    names = [f"base_model.layer.{i}.lora.weight" for i in range(size.num_tensors)]
    reference = {name: rng.normal(0, 0.05, size.shape).astype("<f4") for name in names}
    tensors = [
        {name: (value + rng.normal(0, 1e-3, size.shape)).astype("<f4") for name, value in reference.items()}
        for _ in range(_DRAWN)
    ]
    payloads = [pack(made, values, reference).payload for values in tensors]
    return _Round(made, reference, payloads, tensors, size.num_updates)


def _row(drawn: _Round, repeats: int) -> dict[str, Any]:
    peak_mb = _peak_mb(drawn)
    megabytes = len(drawn.payloads[0]) * drawn.num_updates / 1e6
    rounds = []
    for _ in range(repeats):
        seconds = {_PRODUCT: _seconds(_merged, drawn), _NUMPY: _seconds(_merged_by_numpy, drawn)}
        rounds.append(
            {who: {"ms": 1e3 * s / drawn.num_updates, "mb_s": megabytes / s} for who, s in seconds.items()}
        )
    slower = ratio(rounds, _PRODUCT, _NUMPY, what="ms")
    return {**medians(rounds), "times_numpy": slower, "peak_mb": peak_mb}


def _merged(drawn: _Round) -> Arrays:
    strategy: Strategy = fedavg()
    sums = strategy.init(drawn.reference)
    for i in range(drawn.num_updates):
        values = unpack(drawn.codec, drawn.payloads[i % _DRAWN], drawn.reference).values
        sums = strategy.add(sums, Update(values, drawn.reference, 10 + i))
    return strategy.finish(sums, drawn.reference, {})[0]


def _merged_by_numpy(drawn: _Round) -> Arrays:
    totals, weight = {name: np.zeros(value.shape) for name, value in drawn.reference.items()}, 0
    for i in range(drawn.num_updates):
        for name, value in drawn.tensors[i % _DRAWN].items():
            if not np.isfinite(value).all():
                raise ValueError(name)
            totals[name] += value.astype(np.float64) * (10 + i)
        weight += 10 + i
    return {name: (total / weight).astype("<f4") for name, total in totals.items()}


def _seconds(merge: Callable[[_Round], Arrays], drawn: _Round) -> float:
    began = time.thread_time()
    merge(drawn)
    return time.thread_time() - began


def _peak_mb(drawn: _Round) -> float:
    """Largest memory of a round beside its payloads; it also warms up."""
    tracemalloc.start()
    try:
        _merged(drawn)
        return round(tracemalloc.get_traced_memory()[1] / 1e6, 1)
    finally:
        tracemalloc.stop()
