"""What is asked of a worker and what it answers, as bytes: the same to a process, a Ray actor and the journal."""

from hashlib import sha256
from typing import Any

import msgspec
import numpy as np

from fleetune.device_runtime import errors
from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.errors import FleetuneError
from fleetune.device_runtime.prepared import prepared
from fleetune.toolkit.simulation.calls import Call


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Which samples of a data file a device holds."""

    path: str
    rows: bytes | None
    """Their indices, int32; None for all."""
    columns: Columns = Columns()
    """Where the file has what they hold."""

    @classmethod
    def of(cls, path: str, rows: Indices | None, columns: Columns = Columns()) -> "Share":
        """Pack indices."""
        packed = None if rows is None else np.asarray(rows, np.int32).tobytes()
        return cls(path=path, rows=packed, columns=columns)

    @property
    def indices(self) -> Indices | None:
        """Indices of the samples, int64 (num_samples,)."""
        return None if self.rows is None else np.frombuffer(self.rows, np.int32).astype(np.int64)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A whole local run of a device, or the evaluation of a version on a share; what comes of it depends on this alone."""

    kind: str
    """``train``, ``class-means``, ``held-out`` or ``evaluate``: what :class:`Bench` knows."""
    device: str
    share: Share
    work: LocalWork
    adapter: bytes
    """To start from, or to evaluate: a safetensors file."""
    hidden_cache_mb: float = 0.0
    """Disk that the device has for a hidden cache; 0 for none."""
    files: dict[str, bytes] = {}
    """What the device has kept of earlier runs, beside its checkpoint and caches."""
    memory: MemoryPlan = SAVE_ALL
    """How its steps are held."""
    secret: bytes = b""
    """That work which hides samples draws from; empty for other work."""

    @property
    def key(self) -> str:
        """Digest of all of it; a bound in tokens that is none leaves it as it was in journals older than the bound."""
        told = msgspec.to_builtins(self, builtin_types=(bytes,))
        told["work"] = told_work(self.work)
        told["memory"] = self.memory if self.memory.micro_tokens else self.memory[:-1]
        if not self.secret:
            del told["secret"]
        if self.share.columns == Columns():  # as in journals older than columns with names
            del told["share"]["columns"]
        return sha256(_sorting.encode(told)).hexdigest()


def told_work(work: LocalWork) -> dict[str, Any]:
    """The fields of work as digests have them: of those newer than journals on disks only what says something."""
    told: dict[str, Any] = msgspec.to_builtins(work)
    return {name: value for name, value in told.items() if value or name not in _NEWER}


_NEWER = ("micro_tokens", "sample_clip", "sample_noise", "sample_rate", "class_weights")


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a task; of one that could not be done, why."""

    adapter: bytes = b""
    """The tensors that training changed, or class sums: a safetensors file."""
    calls: list[Call] = []
    """Of the engine, in their order."""
    files: dict[str, bytes] = {}
    """What the device keeps."""
    personal: list[str] = []
    """Names of the tensors that stay on the device."""
    losses: list[float] = []
    active_layers: list[Any] = []
    """Whole numbers, or means where rows pass layers by."""
    stats: dict[str, float] = {}
    importance: list[float] = []
    loss: float = 0.0
    accuracy: float = 0.0
    num_samples: int = 0
    error: str = ""
    error_kind: str = ""

    def check(self) -> "Done":
        """Return it; raise its error if it has one, as it was raised in the worker."""
        if self.error_kind:
            raise getattr(errors, self.error_kind, FleetuneError)(self.error)
        return self


_encoder, _sorting = msgspec.msgpack.Encoder(), msgspec.msgpack.Encoder(order="sorted")
_task_decoder = msgspec.msgpack.Decoder(prepared(Task))
_done_decoder = msgspec.msgpack.Decoder(prepared(Done))


def encode(message: Task | Done) -> bytes:
    """Pack it."""
    return _encoder.encode(message)


def decode_task(content: bytes) -> Task:
    """Unpack a task."""
    return _task_decoder.decode(content)


def decode_done(content: bytes) -> Done:
    """Unpack what came of one."""
    return _done_decoder.decode(content)
