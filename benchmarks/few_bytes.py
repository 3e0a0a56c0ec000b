"""Few bytes for real: eight device processes and a real Mosquitto, packed in several ways, counted by the server too.

The federation is that of ``federation``, with fewer rounds and a class-mean head. The server's count is of what it received: each
message once, those of the evaluator included.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.federation import FLEET, JOB, WORK, federate, prepare
from benchmarks.measuring.figures import table
from fleetune.broker.jobs.settings import Job
from fleetune.device_runtime.errors import UnknownName, choices

ROUNDS, STEPS = 6, 20
Settings = Mapping[str, Any]
_UP, _DOWN = {"codec": "topk", "codec_ratio": 0.25, "codec_bits": 4}, {"down_codec": "quant", "down_bits": 4}
ARMS: dict[str, tuple[Settings, Settings]] = {
    "fp32": ({"codec": "fp32"}, {"down_codec": "whole"}),
    "int8": ({"codec": "int8"}, {"down_codec": "int8"}),
    "lean-quarter": (_UP, _DOWN),
    "signs": ({"codec": "quant", "codec_bits": 1}, {"down_codec": "quant", "down_bits": 3}),
}
"""Of local work and of the job."""


def measure(say: Callable[[str], None], *, only: Sequence[str] = ()) -> dict[str, Any]:
    """Bytes and accuracy of each arm; ``only`` names arms."""
    if unknown := [name for name in only if name not in ARMS]:
        raise UnknownName(f"no arm {unknown[0]!r}; have: {choices(ARMS)}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, say)
        for arm in only or ARMS:
            rows.append({"arm": arm, **_row(folder, arm, say)})
    for line in table(rows):
        say(line)
    return {"benchmark": "few-bytes", "rounds": ROUNDS, "rows": rows}


def _row(folder: Path, arm: str, say: Callable[[str], None]) -> dict[str, Any]:
    own, of_job = ARMS[arm]
    job = Job(JOB, **{**FLEET, "rounds": ROUNDS, "head_start": "class-mean", **of_job})
    work = msgspec.structs.replace(WORK, steps=STEPS, **own)
    found = federate(folder, arm, job, work, say)
    return {
        name: found[name] for name in ("bytes_up", "bytes_down", "link_bytes", "server_bytes", "accuracy")
    }
