"""Signed federations: the bits of unsigned ones, whatever is lost, doubled or killed; and a stranger on a real server."""

import getpass
import shutil

import pytest
from background import begin
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flat import FEW_SAMPLES
from fleet import FOUR, in_process, roughly, world
from servers import free_port, password_file
from signed import KEY, trusting
from waiting import until

from fleetune.broker.aggregation import aggregate
from fleetune.broker.jobs.settings import Job
from fleetune.broker.servers.mosquitto import write_configuration
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.agent.identity import Duty
from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.commands.sign import sign
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Finished,
    Offer,
    TransferManifest,
    Verdict,
    aggregator_topic,
    decode,
    device_topic,
    encode,
)
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network.link import Link
from fleetune.device_runtime.network.signing import Signer, Signing, Trust, read_private, write_key_pair

WORK = LocalWork(steps=2, batch_size=4)
JOB = "home"


def test_a_signed_job_has_the_bits_of_one_that_is_not(tmp_path):
    signed = world(tmp_path, key=KEY, trusted=trusting(), evaluate=True).run()
    assert signed.aggregator.version(3) == in_process(FOUR, rounds=3, settings=signed.aggregator.settings)
    assert [row.accuracy for row in signed.aggregator.rows][-1] is not None


@pytest.mark.parametrize("seed", range(3))
def test_it_has_them_too_on_a_rough_server_with_kills_of_both_ends(tmp_path, seed):
    rough = world(tmp_path, key=KEY, trusted=trusting(), disturb=roughly(seed), seed=seed)
    rough.die_together(20, 35, 50)
    rough.run()
    assert rough.aggregator.version(3) == in_process(FOUR, rounds=3, settings=rough.aggregator.settings)


def test_nobody_works_for_an_aggregator_of_another_key(tmp_path, caplog):
    strange = world(tmp_path, key=Ed25519PrivateKey.generate(), trusted=trusting())
    for _ in range(60):
        strange.turn()
    assert [device.kinds() for device in strange.devices] == [[]] * 4
    assert f"takes what key {trusting().names} signs" in caplog.text


def test_every_start_is_counted_for_good(tmp_path):
    job = world(tmp_path, key=KEY).aggregator
    assert [job.ledger.begin() for _ in range(2)] == [2, 3]
    job.kill()
    with Ledger(job.folder, job.settings) as again:
        assert again.begin() == 4


@pytest.fixture
def server(tmp_path, start_mosquitto):
    """A Mosquitto as operators configure it; of the login that may use every topic a stranger has the password too."""
    passwords, port = password_file(tmp_path, aggregator="x", kitchen="x", hall="x"), free_port()
    path = write_configuration(
        tmp_path / "conf", port=port, host="127.0.0.1", password_file=passwords, user=getpass.getuser()
    )
    return start_mosquitto(configuration=path, port=port)


class Home:
    """An aggregator and two devices in threads, signed or not."""

    def __init__(self, server, artifact, data, folder, *, is_signed=True):
        self.url = f"mqtt://{{}}:x@127.0.0.1:{server.port}"
        self.artifact, self.data, self.folder = artifact, data, folder
        folder.mkdir()
        self.signing, self.trust = Signing(), Trust()
        if is_signed:
            write_key_pair(folder / "aggregator.key", folder / "aggregator.pub")
            self.signing = Signing(sign_key=str(folder / "aggregator.key"))
            self.trust = Trust(trust=str(folder / "aggregator.pub"))
            self.artifact = shutil.copytree(artifact, folder / "artifact")
            sign(self.artifact, sign_key=folder / "aggregator.key")

    def aggregate(self, *, rounds=2, clients=2, **options):
        return aggregate(
            self.artifact, mqtt=self.url.format("aggregator"), job=Job(JOB, rounds=rounds, clients=clients), work=WORK,
            out=self.folder / "run", signing=self.signing, **options,
        )  # fmt: skip

    def device(self, name, **options):
        return device(
            self.artifact, data=self.data, mqtt=self.url.format(name), job=JOB, state=self.folder / name,
            duty=Duty(idle_limit_s=60.0), resources=Resources(threads=1), trust=self.trust, terms=FEW_SAMPLES,
            **options,
        )  # fmt: skip

    def run(self):
        devices = [begin(self.device, name) for name in ("kitchen", "hall")]
        report = self.aggregate()
        return report, [task.result(60) for task in devices]

    def listen(self, *topics):
        return Link(
            self.url.format("aggregator"), client_id="stranger", topics=topics or [aggregator_topic("none")]
        )


def newest(folder):
    return [path.read_bytes() for path in sorted((folder / "run" / "versions").glob("*.safetensors"))]


def test_over_a_real_server_it_has_the_bits_of_one_that_is_not(server, word_artifact, word_file, tmp_path):
    homes = {
        name: Home(server, word_artifact, word_file, tmp_path / name, is_signed=name == "signed")
        for name in ("plain", "signed")
    }
    said = {}
    for name, home in homes.items():
        with home.listen(aggregator_topic(JOB), device_topic(JOB, "+", "down")) as link:
            link.publish(
                aggregator_topic(JOB), b"", retain=True
            )  # the end of the job before is no end of this one
            link.flush(5)
            _, devices = home.run()
            said[name] = bytes_said_once(link)
        assert [found.rounds for found in devices] == [2, 2]
    assert newest(homes["signed"].folder) == newest(homes["plain"].folder) != []
    assert 0 < said["signed"] - said["plain"] < 100 * 97


def bytes_said_once(link):
    """Bytes of an aggregator's messages; what it says again, as chance has it who comes when, counts once."""
    sizes = {}
    while heard := link.receive(1.0):
        topic, payload = heard
        if payload:
            message = decode(payload)
            what = (getattr(message, name, None) for name in ("task_id", "sha256", "index"))
            sizes[(topic, type(message), *what)] = len(payload)
    return sum(sizes.values())


class Stranger:
    """Has the aggregator's login, and what was recorded on the server."""

    def __init__(self, link, name):
        self.link, self.down = link, device_topic(JOB, name, "down")

    def say(self, payload, *, topic=None, retain=False):
        self.link.publish(topic or self.down, payload, retain=retain)

    def try_everything(self):
        manifest = TransferManifest(size_bytes=3, chunk_bytes=3, chunk_digests=bytes(8), sha256="f" * 64)
        names = {"job": JOB, "round": 1}
        self.say(encode(Offer(**names, version=0, role="train", work=WORK, adapter=manifest, deadline_s=0.0)))
        self.say(encode(Verdict(**names, task_id="train-1-kitchen", accepted=False, reason="worthless")))
        self.say(encode(Finished(job=JOB, reason="go home")))
        self.say(encode(Finished(job=JOB, reason="go home", is_error=True)))
        over = AggregatorStatus(job=JOB, session="s", online=True, round=9, version=9, finished=True)
        self.say(encode(over), topic=aggregator_topic(JOB), retain=True)
        self.say(Signer(Ed25519PrivateKey.generate(), start=9).seal(self.down, encode(Finished(job=JOB))))
        self.link.flush(5)


def test_a_stranger_with_the_aggregators_login_moves_no_device_and_is_logged(
    server, word_artifact, word_file, tmp_path, caplog
):
    home, events = Home(server, word_artifact, word_file, tmp_path / "home"), []
    task = begin(home.device, "kitchen", on_event=events.append)
    with home.listen() as link:
        until(lambda: any(event.kind == "connected" for event in events))
        Stranger(link, "kitchen").try_everything()
        until(lambda: caplog.text.count("takes what key") >= 5)
        assert [event.kind for event in events] == ["connected"]
        report = home.aggregate(clients=1)
    assert (report.rounds, task.result(60).rounds) == (2, 2)
    assert "worthless" not in caplog.text


def test_what_a_real_server_recorded_is_refused_when_it_is_said_again(
    server, word_artifact, word_file, tmp_path, caplog
):
    """Old offers, verdicts and ends, to a device that was started anew; then the job goes on."""
    home = Home(server, word_artifact, word_file, tmp_path / "home")
    with home.listen(device_topic(JOB, "kitchen", "down")) as link:
        task = begin(home.device, "kitchen")
        home.aggregate(clients=1)
        assert task.result(60).rounds == 2
        recorded = []
        while message := link.receive(0.2):
            recorded.append(message[1])
        events = []
        task = begin(home.device, "kitchen", on_event=events.append)
        until(lambda: any(event.kind == "connected" for event in events))
        assert {type(decode(payload)).__name__ for payload in recorded} >= {"Offer", "Verdict", "Finished"}
        for payload in recorded:
            link.publish(device_topic(JOB, "kitchen", "down"), payload)
        until(lambda: "it was recorded and said again" in caplog.text)
        report = home.aggregate(rounds=3, clients=1)
    assert (report.rounds, task.result(60).rounds) == (3, 1)
    assert [str(event) for event in events if event.kind == "offer"] == ["round 3: offer: version 2"]
    with OutboxFile(home.folder / "kitchen" / "outbox.sqlite") as outbox:
        assert outbox.recall(f"signed/{JOB}")


def test_keys_that_will_not_do_are_told_before_anything_is_connected(word_artifact, word_file, tmp_path):
    write_key_pair(tmp_path / "key", tmp_path / "pub")
    common = {"mqtt": "mqtt://127.0.0.1:1", "job": JOB}
    with pytest.raises(ConfigError, match="holds a private key; expected public keys alone"):
        device(
            word_artifact,
            data=word_file,
            **common,
            state=tmp_path / "s",
            trust=Trust(trust=str(tmp_path / "key")),
        )
    with pytest.raises(ConfigError, match="no private key in PEM"):
        aggregate(
            word_artifact, mqtt="mqtt://127.0.0.1:1", job=Job(JOB, rounds=1, clients=1), out=tmp_path / "run",
            signing=Signing(sign_key=str(tmp_path / "pub")),
        )  # fmt: skip
    assert read_private(tmp_path / "key")
    assert not (tmp_path / "run").exists()
