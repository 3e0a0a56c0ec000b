"""A device's life: greets, takes offers, fetches adapters, trains or evaluates, delivers; no thread, clock or socket."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from math import inf
from pathlib import Path

import msgspec
import numpy as np

from device_runtime.arrays import Arrays, to_bytes
from device_runtime.codecs import encode_with_feedback
from device_runtime.deliveries import Deliveries
from device_runtime.errors import ArtifactError, ConfigError, DataError, FleetuneError, WireError
from device_runtime.identity import Event, Identity
from device_runtime.loopback import Connection, send
from device_runtime.outbox import Outbox
from device_runtime.pause import Gate
from device_runtime.rules import Reading, Rules
from device_runtime.statedir import StateFolder, parse_adapter
from device_runtime.tables import Table
from device_runtime.transfer import Outgoing, Pull
from device_runtime.wire import (
    AggregatorStatus,
    Chunk,
    Decline,
    Finished,
    Hello,
    Message,
    Offer,
    Report,
    Request,
    UpdateReady,
    Verdict,
    decode,
    device_topic,
    encode,
)
from device_runtime.workbench import Stepped, Training, Workbench

log = logging.getLogger(__name__)

HELLO_S = 30.0
"""A device that has nothing to do and has heard nothing for so long says hello again."""
DEADLINE_GRACE_S = 5.0
"""A paused device gives a round up so long after its deadline: the aggregator may extend it then."""
_MESSAGES_A_POLL = 64
_LOSSES_TOLD = 20
_ADAPTER_SLACK_BYTES = 64 * 1024


@dataclass
class _Task:
    offer: Offer
    key: str
    deadline: float
    pull: Pull | None = None
    reference: Arrays = field(default_factory=dict)
    training: Training | None = None


class Agent:
    """One device for one job. Call ``poll`` at once while it returns True, else after a message or a little while."""

    def __init__(
        self,
        link: Connection,
        outbox: Outbox,
        workbench: Workbench,
        *,
        identity: Identity,
        folder: Path,
        adapter: Arrays,
        checkpoint_every: int = 20,
        gate: Gate | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        """Prepare.

        Args:
            link: open, subscribed to ``identity.topics``, with ``identity.will``.
            outbox: the device's.
            workbench: what it trains and evaluates with.
            identity: who it is.
            folder: where it keeps its state.
            adapter: version 0 of the artifact, float32 by tensor name.
            checkpoint_every: steps between two checkpoints.
            gate: when it may work; by default always.
            on_event: told of everything that happens.
        """
        self.finished = ""
        """Why the device may stop; empty as long as it may not."""
        self.is_unwanted = False
        """Whether it may stop because the aggregator cannot use it."""
        self.heard_at = 0.0
        """When the last message came."""
        self._link, self._workbench, self._identity = link, workbench, identity
        self._outbox, self._state = outbox, StateFolder(folder)
        self._deliveries = Deliveries(link, outbox, job=identity.job, device_id=identity.device_id)
        self._adapter, self._original = adapter, to_bytes(adapter)
        self._checkpoint_every, self._on_event = checkpoint_every, on_event or (lambda _: None)
        self._gate = gate or Gate(Rules(), Reading)
        self._shut_by: tuple[str, ...] = ()
        self._task: _Task | None = None
        self._version = -1
        self._session = ""
        self._newest_round = -1
        self._done: set[str] = set()
        self._connections = -1
        self._must_greet = False
        self._hello_due = 0.0

    def poll(self, now: float) -> bool:
        """Take what has come, announce what is due, do one step of work; True if there is more to do at once."""
        self._mind_rules(now)
        self._greet(now)
        for _ in range(_MESSAGES_A_POLL):
            message = self._link.receive(0.0)
            if message is None:
                break
            self.take(*message, now)
        if not self._must_be_quiet:
            self._deliveries.announce(now)
        return not self.finished and self._work(now)

    @property
    def is_paused(self) -> bool:
        """Whether its rules keep it from the work it has."""
        waits_for_chunks = self._task and self._task.pull and not self._must_be_quiet
        return bool(self._task and self._gate.reasons and not waits_for_chunks)

    def take(self, topic: str, payload: bytes, now: float) -> None:
        """Take a message; a bad one is dropped with one line in the log."""
        if topic not in self._identity.topics:
            return  # amqtt 0.12 was seen to deliver retained statuses to clients that did not ask for them
        try:
            self._dispatch(decode(payload), now)
        except WireError as exc:
            log.warning("dropped a message on %s: %s", topic, exc)

    def _dispatch(self, message: Message, now: float) -> None:
        job = getattr(message, "job", self._identity.job)
        if job != self._identity.job:
            raise WireError(f"it names job {job[:64]!r}; this device is in {self._identity.job!r}")
        self.heard_at = now
        self._hello_due = max(self._hello_due, now + HELLO_S)
        if isinstance(message, AggregatorStatus):
            self._heard(message)
        elif isinstance(message, Offer):
            self._offered(message, now)
        elif isinstance(message, Chunk):
            self._fetched(message, now)
        elif isinstance(message, Request):
            if not self._must_be_quiet:
                self._deliveries.serve(message, now)
        elif isinstance(message, Verdict):
            self._settle(message)
        elif isinstance(message, Finished):
            self._finish(message.reason or "the job is over", is_unwanted=message.is_error)
        else:
            raise WireError(f"a device takes no {type(message).__name__}")

    def _mind_rules(self, now: float) -> None:
        self._gate.is_open(now)
        forbidding = tuple(self._gate.reasons)
        if forbidding == self._shut_by:
            return
        self._shut_by = forbidding
        self._send_status()
        self._tell("paused" if forbidding else "resumed", max(self._newest_round, 0), text=self._gate.text)
        training = self._task.training if self._task else None
        if self._task and training and training.step_index and forbidding:
            self._state.keep_checkpoint(self._task.key, training.save)

    @property
    def _must_be_quiet(self) -> bool:
        """Whether the network is one over which nothing but small messages may go."""
        return "network" in self._gate.reasons

    def _send_status(self) -> None:
        status = self._identity.status(online=True, paused=self._gate.text)
        send(self._link, self._identity.will[0], status, retain=True)

    def _greet(self, now: float) -> None:
        if self._link.connections != self._connections:
            self._connections = self._link.connections
            self._send_status()
            self._must_greet = True
        if self._must_greet or (self._is_waiting and now >= self._hello_due):
            self._hello(now)

    @property
    def _is_waiting(self) -> bool:
        return self._task is None or self._task.pull is not None

    def _hello(self, now: float) -> None:
        self._must_greet = False
        self._hello_due = now + HELLO_S
        self._deliveries.rush()
        if self._task and self._task.pull:
            self._task.pull.restart(now)
        hello = Hello(
            device_id=self._identity.device_id,
            artifact=self._identity.artifact,
            role=self._identity.role,
            num_samples=self._workbench.num_samples,
            version=self._version,
        )
        self._send(hello)

    def _heard(self, status: AggregatorStatus) -> None:
        if status.finished:
            self._heard_the_end()
        elif status.online and status.session != self._session:
            self._session = status.session
            self._outbox.remember(self._session_key, status.session.encode())
            self._newest_round = -1
            self._done.clear()
            self._must_greet = True

    def _heard_the_end(self) -> None:
        if self._session or self._outbox.recall(self._session_key):
            self._finish("the job is over", is_unwanted=False)
        else:
            log.info("job %s was finished before this device came; waiting for another", self._identity.job)

    @property
    def _session_key(self) -> str:
        return f"session/{self._identity.job}"

    def _offered(self, offer: Offer, now: float) -> None:
        key = _key(offer)
        if offer.role != self._identity.role:
            raise WireError(f"offer to {offer.role[:64]!r}; this device's role is {self._identity.role!r}")
        if self._task and self._task.key == key:
            self._task.deadline = _deadline(offer, now)
            return
        if key in self._done or offer.round < self._newest_round:
            return
        if self._deliveries.holds(offer.round):
            if self._outbox.recall(self._made_key(offer.round)) == key.encode():
                self._deliveries.rush()
                return
            self._deliveries.drop(offer.round)
        self._begin(offer, key, now)

    def _begin(self, offer: Offer, key: str, now: float) -> None:
        self._newest_round = offer.round
        self._state.forget_checkpoints(but=key)
        self._task = _Task(offer, key, _deadline(offer, now))
        self._tell("offer", offer.round, {"version": offer.version})
        content = self._held(offer.adapter.sha256)
        if content is not None:
            self._ready(self._task, content)
            return
        size_bytes_max = len(self._original) + _ADAPTER_SLACK_BYTES
        try:
            self._task.pull = Pull(offer.adapter, size_bytes_max=size_bytes_max, now=now)
        except WireError as exc:
            self._decline(self._task, exc)

    def _held(self, digest: str) -> bytes | None:
        if sha256(self._original).hexdigest() == digest:
            return self._original
        return self._state.adapter(digest)

    def _fetched(self, chunk: Chunk, now: float) -> None:
        pull = self._task.pull if self._task else None
        if pull and pull.sha256 == chunk.sha256:
            pull.add(chunk, now)

    def _ready(self, task: _Task, content: bytes) -> None:
        try:
            task.reference = parse_adapter(content, self._adapter)
        except WireError as exc:
            self._decline(task, exc)
            return
        task.pull = None
        self._version = task.offer.version
        if content is not self._original:
            self._state.keep_adapter(content)

    def _work(self, now: float) -> bool:
        task = self._task
        if task is None:
            return False
        if self._gate.reasons and now > task.deadline + DEADLINE_GRACE_S:
            self._decline(task, f"paused: {self._gate.text}")
            return False
        if task.pull:
            return not self._must_be_quiet and self._pull(task, task.pull, now)
        if self._gate.reasons:
            return False
        try:
            _ROLES[self._identity.role](self, task)
        except (ConfigError, DataError, ArtifactError, WireError) as exc:
            self._decline(task, exc)
        return self._task is not None

    def _pull(self, task: _Task, pull: Pull, now: float) -> bool:
        if request := pull.due(now):
            self._send(request)
        if not pull.done:
            return False
        try:
            content = pull.content()
        except WireError as exc:
            self._decline(task, exc)
            return False
        self._ready(task, content)
        return True

    def _train(self, task: _Task) -> None:
        if task.training is None:
            task.training = self._started(task)
        if not task.training.done:
            step = task.training.step()
            self._tell("step", task.offer.round, _figures(task.training.step_index, step))
        if task.training.done:
            self._hand_over(task, task.training)
        elif task.training.step_index % self._checkpoint_every == 0:
            self._state.keep_checkpoint(task.key, task.training.save)

    def _started(self, task: _Task) -> Training:
        path = self._state.checkpoint(task.key)
        if path.is_file():
            training = self._workbench.start(task.offer.work, copied(task.reference))
            try:
                training.restore(path)
            except (ArtifactError, ConfigError) as exc:
                log.warning("round %d: starting afresh: %s", task.offer.round, exc)
                path.unlink()
            else:
                return training
        return self._workbench.start(task.offer.work, copied(task.reference))

    def _hand_over(self, task: _Task, training: Training) -> None:
        offer, residual = task.offer, self._state.residual(task.offer.round)
        values = _changed(training.adapter, task.reference, owed=residual)
        payload, left = encode_with_feedback(offer.work.codec, values, task.reference, residual)
        losses = [step.loss for step in training.history[-_LOSSES_TOLD:]]
        stats = {"loss": float(np.mean(losses))} if losses else {}
        update = UpdateReady(
            device_id=self._identity.device_id,
            job=offer.job,
            round=offer.round,
            version=offer.version,
            codec=offer.work.codec,
            num_samples=self._workbench.num_samples,
            payload=Outgoing(payload, chunk_bytes=self._link.chunk_bytes).manifest,
            stats=stats,
        )
        # In this order: a crash in between repeats the hand-over from the last checkpoint, with the same residual.
        self._state.keep_residual(offer.round, left)
        self._deliveries.put(update, payload, facts={self._made_key(offer.round): task.key.encode()})
        self._drop_task()
        self._tell("trained", offer.round, {**stats, "size_bytes": len(payload)})

    def _evaluate(self, task: _Task) -> None:
        offer = task.offer
        measured = self._workbench.evaluate(offer.work, task.reference)
        report = Report(
            device_id=self._identity.device_id,
            job=offer.job,
            round=offer.round,
            version=offer.version,
            loss=measured.loss,
            accuracy=measured.accuracy,
            num_samples=measured.num_samples,
        )
        self._deliveries.put(report, facts={self._made_key(offer.round): task.key.encode()})
        self._drop_task()
        self._tell("evaluated", offer.round, {"loss": measured.loss, "accuracy": measured.accuracy})

    def _made_key(self, round_number: int) -> str:
        return f"made/{self._identity.job}/{round_number}"

    def _decline(self, task: _Task, reason: FleetuneError | str) -> None:
        number = task.offer.round
        log.error("round %d: declined: %s", number, reason)
        self._done.add(task.key)
        self._drop_task()
        identity = self._identity
        self._send(
            Decline(device_id=identity.device_id, job=identity.job, round=number, reason=str(reason)[:500])
        )
        self._tell("declined", number, text=str(reason))

    def _drop_task(self) -> None:
        self._task = None
        self._state.forget_checkpoints()

    def _settle(self, verdict: Verdict) -> None:
        header = self._deliveries.settle(verdict)
        if header is None:
            return
        made = self._outbox.recall(self._made_key(verdict.round))
        if made:
            self._done.add(made.decode())
        if isinstance(header, UpdateReady):
            self._state.settle(verdict.round, accepted=verdict.accepted)
        if not verdict.accepted:
            log.warning("round %d: refused: %s", verdict.round, verdict.reason)
        self._tell("accepted" if verdict.accepted else "refused", verdict.round, text=verdict.reason)

    def _finish(self, reason: str, *, is_unwanted: bool) -> None:
        if self.finished:
            return
        self.finished, self.is_unwanted = reason, is_unwanted
        self._task = None
        self._tell("finished", self._newest_round, text=reason)

    def _send(self, message: Message) -> None:
        send(self._link, device_topic(self._identity.job, self._identity.device_id, "up"), encode(message))

    def _tell(
        self, kind: str, number: int, values: Mapping[str, float] | None = None, *, text: str = ""
    ) -> None:
        self._on_event(Event(kind, number, values or {}, text))


_ROLES: Table[Callable[[Agent, _Task], None]] = Table(
    "role", {"train": Agent._train, "evaluate": Agent._evaluate}
)


def copied(arrays: Arrays) -> Arrays:
    """Own, writable copies."""
    return {name: np.array(value) for name, value in arrays.items()}


def _figures(step_index: int, step: Stepped) -> dict[str, float]:
    return {
        "step": step_index,
        "loss": step.loss,
        "active_layers": step.active_layers,
        "seconds": step.seconds,
    }


def _deadline(offer: Offer, now: float) -> float:
    return now + offer.deadline_s if offer.deadline_s > 0 else inf


def _key(offer: Offer) -> str:
    same = (offer.job, offer.round, offer.version, offer.role, offer.work, offer.adapter.sha256)
    return sha256(msgspec.msgpack.encode(same)).hexdigest()[:16]


def _changed(values: Arrays, reference: Arrays, *, owed: Arrays) -> Arrays:
    """Only what training touched travels; a layer that never ran costs nothing."""
    touched = {n: v for n, v in values.items() if n in owed or v.tobytes() != reference[n].tobytes()}
    return touched or values
