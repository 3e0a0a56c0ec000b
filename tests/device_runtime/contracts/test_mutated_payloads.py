"""Payloads with anything changed in them: right shapes and finite numbers, or a WireError, whatever happened to it."""

import msgspec
import numpy as np
import pytest

from fleetune.device_runtime.contracts.codecs import make_codec, pack, unpack
from fleetune.device_runtime.errors import WireError

CASES = [
    ("fp32", 0.0, 0), ("fp16", 0.0, 0), ("int8", 0.0, 0), ("xor", 0.0, 0), ("topk", 0.3, 0), ("topk", 0.3, 16), ("topk", 0.3, 8),
    ("topk", 0.3, 4), ("quant", 0.0, 1), ("quant", 0.0, 2), ("quant", 0.0, 4), ("quant", 0.0, 8), ("quant", 0.0, 16),
    ("innovation", 0.0, 0), ("innovation", 0.0, 3), ("caesar", 0.4, 0), ("caesar", 0.4, 16), ("caesar-sign", 0.4, 0),
    ("caesar-zero", 0.4, 0),
]  # fmt: skip
REFERENCE = {
    "m.layer.0.a": np.linspace(-1, 1, 60, dtype=np.float32).reshape(6, 10),
    "m.layer.1.b": np.zeros((), np.float32),
    "z": np.zeros((0, 3), np.float32),
}
_SPICE = (
    b"\xff\xff\xff\xff",
    b"\x00\x00\xc0\x7f",
    b"\x80\x7f",
    b"\xcb\x7f\xf0\x00",
    b"\xdd\xff",
    b"\xc6\x7f\xff\xff\xff",
    b"",
)


def original(codec):
    rng = np.random.default_rng(0)
    values = {n: (v + rng.normal(0, 0.1, v.shape)).astype(np.float32) for n, v in REFERENCE.items()}
    return pack(codec, values, REFERENCE).payload


def mutated(payload, rng):
    """Bytes changed, cut out, doubled or put in, anywhere in the payload or within one of its parts."""
    if rng.random() < 0.5:
        return _spoiled(payload, rng)
    fields = msgspec.msgpack.decode(payload)
    tensors = fields.get("tensors") or [{"data": b""}]
    if "parts" not in fields:
        tensor = tensors[rng.integers(len(tensors))]
        tensor["data"] = _spoiled(tensor["data"], rng)
        return msgspec.msgpack.encode(fields)
    name = [*fields["parts"], "table"][rng.integers(len(fields["parts"]) + 1)]
    size, data = fields["parts"].get(name, fields["table"])
    data = _spoiled(data, rng)
    section = [len(data) if rng.random() < 0.7 else int(size), data]
    fields |= {"table": section} if name == "table" else {"parts": fields["parts"] | {name: section}}
    return msgspec.msgpack.encode(fields)


def _spoiled(data, rng):
    content = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(content) + 1))
        match int(rng.integers(4)):
            case 0:
                content[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                del content[at : at + int(rng.integers(1, 9))]
            case 2:
                content[at:at] = content[at : at + int(rng.integers(1, 9))]
            case _:
                content[at : at + 4] = _SPICE[rng.integers(len(_SPICE))]
    return bytes(content)


def check(case, count):
    codec, rng = make_codec(*case), np.random.default_rng(7)
    payload, decoded = original(codec), 0
    for _ in range(count):
        try:
            values = unpack(codec, mutated(payload, rng), REFERENCE).values
        except WireError:
            continue
        decoded += 1
        for name, value in values.items():
            assert value.shape == REFERENCE[name].shape
            assert np.isfinite(value).all()
    assert decoded, "no mutation got through the frame: the decoder was not tried"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_some_mutations_do_no_harm(case):
    check(case, 400)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hundred_thousand_mutations_do_no_harm(case):
    check(case, 100_000)
