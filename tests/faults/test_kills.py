"""Everything is killed, again and again, and nothing changes. FLEETUNE_KILLS is the number of a campaign.

Noise of devices is secret, and follows from the file ``noise.key`` alone: with the same file it is the same bits.
"""

import os
import shutil
from hashlib import sha256

import pytest
from campaigns import Campaign, killing
from words import write_lines

from fleetune.device_runtime.commands.sign import sign
from fleetune.device_runtime.contracts.gaussian import NOISE_SECRET
from fleetune.device_runtime.network.signing import write_key_pair

KILLS = int(os.environ.get("FLEETUNE_KILLS", "100"))
JOBS = {
    "fp32 fedavg": {},
    "int8 fedavgm": {"codec": "int8", "strategy": "fedavgm"},
    "signed": {"is_signed": True},
    "signed and masked": {"is_signed": True, "secure": "masks"},
    "signed, masked and each sample hidden": {
        "is_signed": True,
        "secure": "masks",
        "dp": "sample",
        "clip": 1.0,
        "noise": 2.0,
        "sample_rate": 0.1,
        "optimizer": "sgd",
    },
    "signed, with noise of each device": {"is_signed": True, "dp": "local", "clip": 1.0, "noise": 0.5},
}
"""Options of aggregate by the name of a campaign, and whether artifact and messages are signed."""
COMMON = {
    "clients": 3,
    "local_steps": 8,
    "batch_size": 8,
    "seq_len": 16,
    "lr": 0.01,
    "deadline_s": 0,
    "evaluation_s": 60,
}


def campaign_of(root, artifact, *, rounds, is_signed=False, **options):
    """A campaign's federation of so many rounds, with further options of aggregate."""
    root.mkdir(parents=True)
    device = {"checkpoint_every": 2}
    if is_signed:
        write_key_pair(root / "key", root / "key.pub")
        artifact = shutil.copytree(artifact, root / "artifact")
        sign(artifact, sign_key=root / "key")
        options |= {"sign_key": str(root / "key")}
        device |= {"trust": str(root / "key.pub")}
    if "dp" in options:
        device |= {"most_epsilon": 0 if options["dp"] == "local" else 1000}
    data = {name: write_lines(root / f"{name}.csv", seed=i) for i, name in enumerate((*Campaign.NAMES, "e"))}
    campaign = Campaign(
        root / "job",
        artifact,
        data,
        job={**COMMON, "rounds": rounds, **options},
        device=device,
    )
    for name in Campaign.NAMES if "dp" in options else ():
        state = root / "job" / name
        state.mkdir(mode=0o700)
        (state / NOISE_SECRET).write_bytes(sha256(name.encode()).digest())
    return campaign


def spent_of(came_in):
    """What each device's account says of its data, as bytes; None where nothing is spent."""
    files = {name: came_in / "job" / name / "spent.json" for name in Campaign.NAMES}
    return {name: path.read_bytes() if path.exists() else None for name, path in files.items()}


def check_campaign(tmp_path, artifact, *, kills, rounds, seed=1, **options):
    """Run a job calmly, and with so many SIGKILLs: same bits, no update lost or doubled, no traceback."""
    calm = campaign_of(tmp_path / "calm", artifact, rounds=rounds, **options).run(timeout_s=600)
    disturbed = campaign_of(tmp_path / "killed", artifact, rounds=rounds, **options).run(
        timeout_s=60 + 20 * kills + 30 * rounds, disturb=killing(kills, seed=seed, rounds=rounds)
    )
    print(
        f"{options}: {sum(disturbed.kills.values())} kills {dict(disturbed.kills)}, {disturbed.seconds:.0f} s, calm {calm.seconds:.0f} s"  # noqa: E501
    )
    assert sum(disturbed.kills.values()) == kills, "the job was over before all were killed"
    assert len(disturbed.versions) == rounds + 1
    assert disturbed.bits == calm.bits
    assert (disturbed.updates, disturbed.doubled) == (rounds * len(Campaign.NAMES), 0)
    assert (disturbed.tracebacks, calm.tracebacks) == (0, 0)
    spent = spent_of(tmp_path / "killed")
    assert spent == spent_of(tmp_path / "calm")
    assert (None not in spent.values()) == (options.get("dp") == "sample")


def test_a_few_kills_change_nothing(tmp_path, word_artifact):
    check_campaign(tmp_path, word_artifact, kills=4, rounds=8, codec="int8", strategy="fedavgm")


@pytest.mark.faults
@pytest.mark.parametrize("name", JOBS)
def test_a_hundred_kills_change_nothing(tmp_path, word_artifact, name):
    check_campaign(tmp_path, word_artifact, kills=KILLS, rounds=max(8, KILLS * 2 // 5), **JOBS[name])
