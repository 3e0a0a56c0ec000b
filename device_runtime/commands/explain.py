"""``fleetune device --explain``: the device's own contract in plain words, and what has left it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fleetune.device_runtime.agent.identity import Duty
from fleetune.device_runtime.commands.own_folder import folder_of
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.sequences import Sequences
from fleetune.device_runtime.files import DiskFiles, Files, MemoryFiles
from fleetune.device_runtime.methods.policies import POLICIES
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.signing import Trust, trusted_of, vouching_of
from fleetune.device_runtime.options import check, refuse
from fleetune.device_runtime.terms.account import Account, check_spent
from fleetune.device_runtime.terms.left import Left, Record
from fleetune.device_runtime.terms.tensors import may_leave, name_problems
from fleetune.device_runtime.terms.terms import Terms
from fleetune.device_runtime.terms.words import Limit, limits

LINES = 20
"""So many of the last things that left are shown."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner of a device wants to know of it."""

    jobs: str
    """Who can give it work."""
    masks: str
    """Whom it takes for another device in sums under masks."""
    limits: list[Limit]
    may_leave: list[str]
    """Tensors that may leave, by name."""
    stays: list[str]
    left: list[Left]
    """The last things that left, oldest first."""
    spent: str
    """Of one sample's epsilon, in words; empty where nothing is."""


def explain(
    artifact_dir: Path | str,
    *,
    data: Path | str | None = None,
    columns: Columns = Columns(),
    sequences: Sequences = Sequences(),
    mqtt: str = "",
    job: str = "",
    id: str | None = None,
    state: Path | str | None = None,
    rules: Mapping[str, Any] | Path | str | None = None,
    duty: Duty = Duty(),
    resources: Resources = Resources(),
    reach: Reach = Reach(),
    terms: Terms = Terms(),
    trust: Trust = Trust(),
) -> Explanation:
    """Say what the owner allows, and what has left; nothing is connected and nothing changed.

    It takes what :func:`~fleetune.device_runtime.commands.device.device` takes, from the same file.

    Args:
        artifact_dir: folder made by ``fleetune export``.
        data: not looked at.
        columns: not looked at.
        sequences: not looked at.
        mqtt: not looked at.
        job: the federation; it and ``id`` say where the state folder is.
        id: name of the device.
        state: its folder; without it, ``id`` and ``job`` nothing that left is shown.
        rules: not looked at.
        duty: where the account lies.
        resources: not looked at.
        reach: where its certificate lies.
        terms: what the owner allows.
        trust: whose work is taken.

    Raises:
        ConfigError: a limit is out of range, or names nothing; or the file of keys holds none.
        ArtifactError: the artifact is damaged.
        StateError: the record cannot be read.
    """
    manifest = open_artifact(artifact_dir).manifest
    check_terms(terms, manifest)
    names = [row.name for row in manifest.trainable]
    leaving = may_leave(terms, names)
    folder = folder_of(state, job=job, device_id=id) if state or job else None
    return Explanation(
        jobs=_who(trust),
        masks=_masked_with(reach, trust, id or ""),
        limits=limits(terms),
        may_leave=leaving,
        stays=[name for name in names if name not in leaving],
        left=Record(DiskFiles(folder)).newest(LINES) if folder and folder.is_dir() else [],
        spent=_spent(duty, folder, terms),
    )


def account_of(duty: Duty, files: Files) -> Account:
    """Return the account that a device keeps, or shares."""
    return Account(files, shared=Path(duty.account) if duty.account else None)


def _spent(duty: Duty, folder: Path | None, terms: Terms) -> str:
    if not duty.account and not (folder and folder.is_dir()):
        return ""
    files = DiskFiles(folder) if folder and folder.is_dir() else MemoryFiles()
    spent = account_of(duty, files).read()
    if not spent.steps:
        return ""
    steps = sum(kind.count for kind in spent.steps)
    found = check_spent(spent, most=0.0, delta=terms.delta)
    most = f"{terms.most_epsilon:,.15g} at most" if terms.most_epsilon else "no limit"
    return f"{steps:,} steps that hide each sample: epsilon {found:,.4g} at delta {terms.delta:g}, {most}"


def _who(trust: Trust) -> str:
    trusted = trusted_of(trust)
    if trusted is None:
        return (
            "anybody who can write to the MQTT server can give this device work: name a key with --trust FILE"
        )
    return f"work is taken if this key signed it: {trusted.names}"


def _masked_with(reach: Reach, trust: Trust, device_id: str) -> str:
    vouching = vouching_of(reach, trust, device_id=device_id)
    if vouching.authorities is None:
        return (
            "under masks (secure masks) nobody vouches for the keys of other devices: whoever runs the aggregator or the MQTT "
            "server can put its own in their place, and see this device's update; certificates (fleetune enrol) stop that"
        )
    return f"under masks the keys of other devices are taken if {vouching.where} signed their certificates"


def check_terms(terms: Terms, manifest: Manifest) -> None:
    """Raise ConfigError that lists every limit out of its range, and every name that names nothing in this model."""
    check(terms)
    refuse([*name_problems(terms, [row.name for row in manifest.trainable], POLICIES)])
