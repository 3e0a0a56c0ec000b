"""The rounds of a job by hand: what devices say, and the actions that it causes."""

from hashlib import sha256

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.jobs.work import device_work
from fleetune.broker.rounds.actions import Assign, Enrol
from fleetune.broker.rounds.federation import Federation
from fleetune.broker.store.store import Past
from fleetune.broker.tasks import Task
from fleetune.device_runtime.contracts.wire import (
    Decline,
    Hello,
    Report,
    TransferManifest,
    UpdateReady,
    default_task_id,
)

ARTIFACT = "a" * 64


def job(**changes):
    fields = {"job": "j", "artifact": ARTIFACT, "rounds": 2, "clients": 2, "min_clients": 2, **changes}
    return Settings(**fields)


def task(device, number, position=0, *, version=None, **changes):
    """The task that a device gets in a round, as an aggregator of the fixed configurator makes it."""
    work = device_work(job(**changes), round_number=number, position=position)
    version = number - 1 if version is None else version
    return Task(default_task_id("train", number, device), device, "train", number, version, position, work)


def evaluation(device, version):
    """The offer of an evaluation."""
    work = device_work(job(), round_number=max(version, 1), position=0)
    identity = default_task_id("evaluate", version, device)
    return Assign(Task(identity, device, "evaluate", version, version, 0, work))


def asked(number, *devices, first=0, deadline_s=100.0, **changes):
    """The actions that ask devices in a round: they are recorded, and offered."""
    tasks = tuple(task(device, number, first + i, **changes) for i, device in enumerate(devices))
    return [Enrol(tasks), *(Assign(t, deadline_s) for t in tasks)]


def past(number=1, *devices, accepted=(), **fields):
    """What is remembered in the open round ``number`` with these devices; ``accepted`` = (round, device)."""
    tasks = tuple(task(device, number, i) for i, device in enumerate(devices))
    digests = {default_task_id("train", n, device): f"d-{device}" for n, device in accepted}
    return Past(
        **{"version": number - 1, "closed": number - 1, "tasks": tasks, "accepted": digests, **fields}
    )


def federation(past=None, *, patience=None, **changes):
    return Federation(job(**changes), patience or Patience(deadline_s=100, gather_s=30), now=0.0, past=past)


def hello(device, *, role="train", artifact=ARTIFACT, num_samples=10):
    return Hello(device_id=device, artifact=artifact, role=role, num_samples=num_samples)


def decline(device, number, **changes):
    return Decline(device_id=device, job="j", round=number, reason="no", **changes)


def update(device, round_number, *, digest="d", version=None, codec="fp32", task_id=""):
    payload = TransferManifest(size_bytes=1, chunk_bytes=1, chunk_digests=b"", sha256=f"{digest}-{device}")
    version = round_number - 1 if version is None else version
    return UpdateReady(
        device_id=device,
        job="j",
        task_id=task_id or default_task_id("train", round_number, device),
        round=round_number,
        version=version,
        codec=codec,
        num_samples=10,
        payload=payload,
    )


def update_of(given, payload, *, num_samples=10, **stats):
    """The update of a task with this very payload."""
    manifest = TransferManifest(
        size_bytes=len(payload), chunk_bytes=1024, chunk_digests=b"", sha256=sha256(payload).hexdigest()
    )
    return UpdateReady(
        device_id=given.device_id,
        job="j",
        task_id=given.task_id,
        round=given.round,
        version=given.version,
        codec="fp32",
        num_samples=num_samples,
        payload=manifest,
        stats=stats,
    )


def report(device, version, *, accuracy=0.5, loss=1.0, num_samples=4):
    return Report(
        device_id=device,
        job="j",
        task_id=default_task_id("evaluate", version, device),
        round=version,
        version=version,
        loss=loss,
        accuracy=accuracy,
        num_samples=num_samples,
    )


def give(machine, device, round_number, now=1.0, codec="fp32"):
    sent = update(device, round_number, codec=codec)
    assert isinstance(machine.judge(sent), Task)
    return machine.accepted(sent, now)


def of(kind, actions):
    return [a for a in actions if isinstance(a, kind)]


def opened(*devices, patience=None, **changes):
    machine = federation(
        patience=patience, **{"clients": len(devices), "min_clients": len(devices), **changes}
    )
    for device in devices:
        actions = machine.hello(hello(device), 1.0)
    return machine, actions
