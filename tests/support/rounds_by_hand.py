"""The rounds of a job by hand: what devices say, and the actions that it causes."""

from fleetune.broker.job import Patience, Settings
from fleetune.broker.rounds import Federation
from fleetune.device_runtime.contracts.wire import Hello, Report, TransferManifest, UpdateReady

ARTIFACT = "a" * 64


def job(**changes):
    fields = {"job": "j", "artifact": ARTIFACT, "rounds": 2, "clients": 2, "min_clients": 2, **changes}
    return Settings(**fields)


def federation(past=None, *, patience=None, **changes):
    return Federation(job(**changes), patience or Patience(deadline_s=100, gather_s=30), now=0.0, past=past)


def hello(device, *, role="train", artifact=ARTIFACT, num_samples=10):
    return Hello(device_id=device, artifact=artifact, role=role, num_samples=num_samples)


def update(device, round_number, *, digest="d", version=None, codec="fp32"):
    payload = TransferManifest(size_bytes=1, chunk_bytes=1, chunk_digests=b"", sha256=f"{digest}-{device}")
    version = round_number - 1 if version is None else version
    return UpdateReady(
        device_id=device,
        job="j",
        round=round_number,
        version=version,
        codec=codec,
        num_samples=10,
        payload=payload,
    )


def report(device, version, *, accuracy=0.5, loss=1.0, num_samples=4):
    return Report(
        device_id=device,
        job="j",
        round=version,
        version=version,
        loss=loss,
        accuracy=accuracy,
        num_samples=num_samples,
    )


def give(machine, device, round_number, now=1.0):
    sent = update(device, round_number)
    assert machine.judge(sent) is None
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
