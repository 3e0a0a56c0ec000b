"""What each codec makes of one update of a MiniLM-shaped adapter: bytes by kind, error, speed and memory, without a network.

The update is drawn: heavy-tailed (Student's t, 3 degrees of freedom), each tensor on a scale of its own. Bits and error are told
of a second one too, which is normal: what AdamW makes in a round has tails like that, or lighter. Speed is of the processor's
time in one thread, the best of the repeats; MB are 10**6 bytes of float32.
"""

import math
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring.figures import chart_of, table
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.codecs import (
    CODECS,
    Codec,
    by_nearest,
    make_codec,
    pack,
    sizes_by_kind,
    unpack,
)
from fleetune.device_runtime.errors import UnknownName, choices

REPEATS = 7
_HELD_BYTES = 24_000_000
"""As much as a process with a model has held at some time: what is freed then stays in it (glibc raises its thresholds).

In a new one each call may get its pages anew, up to 3 ms, or not, by what ran before it.
"""
_RANK, _WIDTH, _WIDE, _LAYERS = 16, 384, 1536, 6
_MODULES = {
    "attention.self.query": (_WIDTH, _WIDTH),
    "attention.self.key": (_WIDTH, _WIDTH),
    "attention.self.value": (_WIDTH, _WIDTH),
    "attention.output.dense": (_WIDTH, _WIDTH),
    "intermediate.dense": (_WIDTH, _WIDE),
    "output.dense": (_WIDE, _WIDTH),
}
"""Inputs and outputs of what has a LoRA pair."""
_CASES: dict[str, tuple[tuple[float, int], ...]] = {
    "topk": (
        *((0.1, bits) for bits in (0, 16, 8, 4)),
        *((ratio, bits) for ratio in (0.01, 0.5) for bits in (16, 4)),
    ),
    "quant": tuple((0.0, bits) for bits in (1, 2, 3, 4, 8, 16)),
    "innovation": tuple((0.0, bits) for bits in (0, 2, 4, 8)),
    "caesar": tuple((ratio, bits) for ratio in (0.4, 0.65, 0.9) for bits in (32, 16)),
    "caesar-sign": ((0.4, 32),),
    "caesar-zero": ((0.4, 32),),
}
"""(ratio, bits) of codecs that have them."""
Say = Callable[[str], None]


class _Set(NamedTuple):
    values: Arrays
    reference: Arrays

    @property
    def size_bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS) -> dict[str, Any]:
    """One row per codec, ratio and bits; ``only`` names codecs."""
    if unknown := [name for name in only if name not in CODECS]:
        raise UnknownName(f"no codec {unknown[0]!r}; have: {choices(CODECS)}")
    np.ones(_HELD_BYTES, np.uint8)
    drawn, normal, rows = adapter_update(), adapter_update(tails=math.inf), []
    for label, codec in _cases(only or tuple(CODECS)):
        rows.append({"codec": label, **_row(codec, drawn, repeats), **_of_normal(codec, normal)})
        say(f"{label}: {rows[-1]['bytes']} bytes")
    for line in table(rows):
        say(line)
    return {
        "benchmark": "bytes",
        "fp32_bytes": drawn.size_bytes,
        "slowest_mb_s": min(row["both_mb_s"] for row in rows),
        "rows": rows,
        "chart": chart_of("codec", rows, "bytes"),
    }


def _cases(names: Sequence[str]) -> Iterator[tuple[str, Codec]]:
    for name in names:
        for ratio, bits in _CASES.get(name, ((0.0, 0),)):
            codec, said = make_codec(name, ratio, bits), f"{ratio:g}" if ratio else ""
            label = " ".join(part for part in (name, said, f"{bits} bits" if bits else "") if part)
            yield label, codec
            if codec.encode_nearest:
                yield f"{label}, nearest", by_nearest(codec)


def adapter_update(seed: int = 0, *, tails: float = 3) -> _Set:
    """Draw an adapter and what a round of training made of it: Student's t with ``tails`` degrees of freedom, or normal."""
    rng, reference, values = np.random.default_rng(seed), {}, {}
    for layer in range(_LAYERS):
        for module, (inputs, outputs) in _MODULES.items():
            for side, shape in (("A", (_RANK, inputs)), ("B", (outputs, _RANK))):
                name = f"base_model.model.bert.encoder.layer.{layer}.{module}.lora_{side}.weight"
                reference[name] = rng.normal(0, 0.05, shape).astype(np.float32)
                drawn = rng.standard_t(tails, shape) if math.isfinite(tails) else rng.normal(size=shape)
                step = drawn * 1e-3 * rng.lognormal(0, 0.5)
                values[name] = (reference[name] + step).astype(np.float32)
    return _Set(values, reference)


def _row(codec: Codec, drawn: _Set, repeats: int) -> dict[str, Any]:
    peaks = _peaks_mb(codec, drawn)
    encode_s, decode_s, payload = _times(codec, drawn, repeats)
    megabytes = drawn.size_bytes / 1e6
    return {
        "bytes": len(payload),
        "bits_each": _bits_each(payload, drawn),
        "smaller": round(drawn.size_bytes / len(payload), 1),
        **{kind: size for kind, size in sizes_by_kind(payload).items() if kind != "protocol"},
        "error": round(_error(codec, payload, drawn), 4),
        "encode_mb_s": round(megabytes / encode_s),
        "decode_mb_s": round(megabytes / decode_s),
        "both_mb_s": round(megabytes / (encode_s + decode_s)),
        "encode_peak_mb": round(peaks[0], 1),
        "decode_peak_mb": round(peaks[1], 1),
    }


def _of_normal(codec: Codec, normal: _Set) -> dict[str, Any]:
    payload = pack(codec, normal.values, normal.reference).payload
    return {
        "normal_bits_each": _bits_each(payload, normal),
        "normal_error": round(_error(codec, payload, normal), 4),
    }


def _bits_each(payload: bytes, drawn: _Set) -> float:
    return round(32 * len(payload) / drawn.size_bytes, 2)


def _times(codec: Codec, drawn: _Set, repeats: int) -> tuple[float, float, bytes]:
    """Least processor seconds of packing and of unpacking, and the payload."""
    encode_s, decode_s = [], []
    for _ in range(repeats):
        began = time.thread_time()
        payload = pack(codec, drawn.values, drawn.reference).payload
        packed = time.thread_time()
        unpack(codec, payload, drawn.reference)
        encode_s.append(packed - began)
        decode_s.append(time.thread_time() - packed)
    return min(encode_s), min(decode_s), payload


def _peaks_mb(codec: Codec, drawn: _Set) -> tuple[float, float]:
    """Largest memory beside what was there before, of packing and of unpacking; it also warms up."""
    payload, encode_mb = _peak_mb(lambda: pack(codec, drawn.values, drawn.reference).payload)
    return encode_mb, _peak_mb(lambda: unpack(codec, payload, drawn.reference))[1]


def _peak_mb(work: Callable[[], Any]) -> tuple[Any, float]:
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def _error(codec: Codec, payload: bytes, drawn: _Set) -> float:
    """L2 norm of what is lost, to that of the update."""
    decoded = unpack(codec, payload, drawn.reference).values
    lost = sum(float(np.square(decoded[n] - value).sum()) for n, value in drawn.values.items())
    moved = sum(
        float(np.square(np.float64(value) - drawn.reference[n]).sum()) for n, value in drawn.values.items()
    )
    return float(np.sqrt(lost / moved))
