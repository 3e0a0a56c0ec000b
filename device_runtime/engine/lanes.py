"""Rows of a batch on several threads at once, each running whole graphs by itself.

Kernels that share the work of one operator wait for each other after each of its hundreds a step, and leave the small ones to one
thread. Lanes wait for each other once a step. Measured: `docs/lab.md`, "lanes".
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple, TypeVar

from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan

T = TypeVar("T")
R = TypeVar("R")

FILL = 0.8
"""Lanes pay where at least this share of their time is work; what they save is about a tenth."""
TOKENS = 96
"""Lanes of fewer tokens lose more in matrix products of few rows than they save. Measured: `docs/lab.md`, "lanes"."""
_CPUS = Path("/sys/devices/system/cpu")


class Rows(NamedTuple):
    """How the rows of a batch run: on so many lanes at the same time, or on 1 whose kernels share the threads."""

    lanes: int = 1
    memory: MemoryPlan = SAVE_ALL


def rows_for(size: int, tokens: int, threads: int, memory: MemoryPlan = SAVE_ALL) -> Rows:
    """Choose the lanes for ``size`` rows of about ``tokens`` (0: unknown): as many as threads, or 1 if the rows are too few.

    Raises:
        ConfigError: a number of ``memory`` is below 0.
    """
    memory.check()
    together = memory.together(size, tokens, threads)
    turns = -(-together // threads)
    fills = together >= FILL * threads * turns
    return Rows(threads if fills and (not tokens or together * tokens >= TOKENS * threads) else 1, memory)


def one_by_one(rows: Rows) -> Rows:
    """Run each row by itself, one on each lane at a time."""
    return rows._replace(memory=rows.memory._replace(micro_batch=rows.lanes))


class Lanes:
    """Threads that wait for work; they are started when first needed."""

    def __init__(self, count: int) -> None:
        """``count`` of them at most."""
        self._threads = ThreadPoolExecutor(count, "lane")

    def each(self, work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """``work`` on every part at the same time; waits for all, and raises what the first to fail has raised."""
        if len(parts) == 1:
            return [work(parts[0])]
        futures = [self._threads.submit(work, part) for part in parts]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Stop the threads, when they have done what they do."""
        self._threads.shutdown()


def count_cores() -> int:
    """Cores that this process may run on; threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
