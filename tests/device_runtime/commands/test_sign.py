"""Whose artifact it is."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.commands.sign import SIGNATURE, check_signed, sign
from fleetune.device_runtime.contracts.artifact import MANIFEST, open_artifact
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.network.signing import Trust, Trusted, read_public, write_key_pair
from fleetune.toolkit.cli import app


@pytest.fixture
def keys(tmp_path):
    for name in ("mine", "other"):
        write_key_pair(tmp_path / name, tmp_path / f"{name}.pub")
    return tmp_path


@pytest.fixture
def signed(word_artifact, keys):
    copy = shutil.copytree(word_artifact, keys / "artifact")
    sign(copy, sign_key=keys / "mine")
    return copy


def trusting(keys, name):
    return Trusted(read_public(keys / f"{name}.pub"))


def test_the_holder_of_the_key_is_known_and_nobody_else(signed, keys):
    check_signed(open_artifact(signed), trusting(keys, "mine"))
    with pytest.raises(ArtifactError, match=r"is of key [0-9a-f]{16}, or of another artifact"):
        check_signed(open_artifact(signed), trusting(keys, "other"))
    sign(signed, sign_key=keys / "other")
    check_signed(open_artifact(signed), trusting(keys, "other"))


def test_a_signature_is_of_one_artifact(signed, keys):
    manifest = json.loads((signed / MANIFEST).read_bytes())
    (signed / MANIFEST).write_text(json.dumps(manifest | {"name": "another"}))
    with pytest.raises(ArtifactError, match="or of another artifact"):
        check_signed(open_artifact(signed), trusting(keys, "mine"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: said[:-1], "is damaged"),
        (lambda said: said + b"\0", "is damaged"),
        (lambda said: said[:8] + bytes([said[8] ^ 1]) + said[9:], "or of another artifact"),
        (lambda said: bytes(72), "or of another artifact"),
        (lambda said: b"", "nobody did"),
    ],
)
def test_another_signature_is_refused(signed, keys, change, said):
    path = signed / SIGNATURE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArtifactError, match=said):
        check_signed(open_artifact(signed), trusting(keys, "mine"))


def test_a_device_that_trusts_a_key_opens_no_other_artifact(word_artifact, word_file, keys):
    with pytest.raises(ArtifactError, match="nobody did"):
        device(
            word_artifact, data=word_file, mqtt="mqtt://127.0.0.1:1", job="home", state=keys / "state",
            trust=Trust(trust=str(keys / "mine.pub")),
        )  # fmt: skip
    assert not (keys / "state").exists()


def test_the_command_says_what_it_did(signed, keys):
    done = CliRunner().invoke(app, ["sign", str(signed), "--sign-key", str(keys / "mine"), "--json"])
    report = json.loads(done.stdout)
    assert report == {"artifact": open_artifact(signed).digest, "key": trusting(keys, "mine").names}
    wrong = CliRunner().invoke(app, ["sign", str(signed), "--sign-key", str(keys / "mine.pub")])
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)


def test_a_damaged_artifact_is_not_signed(signed, keys):
    (signed / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError):
        sign(signed, sign_key=keys / "mine")
    with pytest.raises(ConfigError):
        sign(signed, sign_key=keys / "none")
