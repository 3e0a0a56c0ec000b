"""Reads damaged content by the thousand: what escapes that is no error of ours, what takes long, what takes much memory.

As a program: ``python fuzz.py READER COUNT [SEED]`` prints what it found as JSON; memory of the process is bounded.
"""

import json
import logging
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

from mutations import BOMBS, Mutation, bomb

from fleetune.device_runtime.errors import FleetuneError

__all__ = ["BOMBS", "Found", "Reader", "bomb", "fuzz", "mutated"]
SECONDS_MAX, MEGABYTES_MAX = 1.0, 200.0
_HANGS_S = 30
_ADDRESSES = 6 * 1024**3
"""Bytes of address space of a long form: who asks for more has a MemoryError, which is an escape."""


class Reader(NamedTuple):
    """Something that reads what others wrote."""

    samples: list[bytes]
    mutate: Mutation
    read: Callable[[bytes], object]
    """Raises an error of ours, or returns."""


class Found(NamedTuple):
    """What so many mutations came to."""

    tried: int
    refused: int
    escapes: dict[str, int]
    """How often by kind: error, and where in our code."""
    seeds: dict[str, int]
    """The first mutation of each kind."""
    slowest_s: float
    """Of processor time."""
    most_mb: float
    slow: int
    large: int
    seed_of_slowest: int
    seed_of_largest: int


class Hang(BaseException):
    """Something took longer than anybody waits."""


class _Faults(logging.Handler):
    """Errors of none of ours that somebody caught and told."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.endswith("network.complaints"):
            self.told.append(record.getMessage().partition(": ")[2])


def mutated(reader: Reader, seed: int) -> bytes:
    """The content of one number, the same every time."""
    rng = Random(seed)
    return reader.mutate(rng.choice(reader.samples), rng)


def fuzz(reader: Reader, count: int, *, first: int = 0) -> Found:
    """Read so many damaged contents, numbered from ``first``."""
    refused, slow, large, kinds, seeds = 0, 0, 0, Counter[str](), dict[str, int]()
    slowest, most = (0.0, first), (0.0, first)
    with _faults() as faults:
        for sample in reader.samples:
            reader.read(sample)
        for seed in range(first, first + count):
            content = mutated(reader, seed)
            begin_mb, begin_s = _begin_mb(), time.process_time()
            kind = _kind(reader, content, faults)
            taken_s, taken_mb = time.process_time() - begin_s, _peak_mb() - begin_mb
            refused += kind == "refused"
            if kind and kind != "refused":
                kinds[kind] += 1
                seeds.setdefault(kind, seed)
            slow, large = slow + (taken_s > SECONDS_MAX), large + (taken_mb > MEGABYTES_MAX)
            slowest, most = max(slowest, (taken_s, seed)), max(most, (taken_mb, seed))
    return Found(
        count, refused, dict(kinds), seeds, *_rounded(slowest, most), slow, large, slowest[1], most[1]
    )


def _rounded(slowest: tuple[float, int], most: tuple[float, int]) -> tuple[float, float]:
    return round(slowest[0], 3), round(most[0], 1)


def _kind(reader: Reader, content: bytes, faults: _Faults) -> str:
    """``refused``, empty for what was read, or what escaped."""
    try:
        reader.read(content)
    except FleetuneError as exc:
        return "refused" if "\n" not in str(exc) else f"more than one line: {type(exc).__name__}"
    except (Exception, Hang) as exc:  # noqa: BLE001 (whatever it is, it is what is looked for)
        return f"{type(exc).__name__} at {_place(exc)}"
    told, faults.told = faults.told, []
    return f"told: {told[0].partition(':')[0]}" if told else ""


def _place(exc: BaseException) -> str:
    frames = [
        f
        for f in traceback.extract_tb(exc.__traceback__)
        if "/tests/" not in f.filename and "site-packages" not in f.filename
    ]
    ours = [
        f
        for f in frames
        if "device_runtime" in f.filename or "broker" in f.filename or "toolkit" in f.filename
    ]
    last = (ours or frames)[-1:]
    return f"{Path(last[0].filename).name}:{last[0].lineno}" if last else "?"


def _begin_mb() -> float:
    """Resident memory now, from which its peak counts on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mb()


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@contextmanager
def _faults() -> Iterator[_Faults]:
    logger, faults = logging.getLogger("fleetune"), _Faults()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(faults)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield faults
    finally:
        logger.removeHandler(faults)
        logger.setLevel(level)
        logger.propagate = propagate


def main() -> None:
    """Fuzz one reader in this process, whose memory is bounded and whose hangs are told."""
    from readers import READERS

    name, count, first = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    signal.signal(signal.SIGALRM, _hung)
    with (
        tempfile.TemporaryDirectory(prefix="fleetune-fuzz-") as folder,
        READERS[name](Path(folder)) as reader,
    ):
        watched = reader._replace(read=_watched(reader.read))
        print(json.dumps(fuzz(watched, count, first=first)._asdict()), flush=True)


def _watched(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    def watched(content: bytes) -> None:
        signal.alarm(_HANGS_S)
        try:
            read(content)
        finally:
            signal.alarm(0)

    return watched


def _hung(*_: object) -> None:
    raise Hang


if __name__ == "__main__":
    main()
