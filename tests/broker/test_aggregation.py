"""``aggregate`` over a real Mosquitto: who may, what it leaves after every round, and what a later start may change."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
from flat import aggregate, device, train

from fleetune.broker.service import rivals
from fleetune.device_runtime.arrays import load_arrays
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.contracts.wire import AggregatorStatus, aggregator_topic, encode
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network.link import Link

WORK = {"job": "home", "clients": 1, "local_steps": 1, "seq_len": 8, "evaluation_s": 5}


class Home:
    """An aggregator in this thread, a device in another; both resume."""

    def __init__(self, url, artifact, data, folder, pool):
        self.url, self.artifact, self.data, self.folder, self.pool = url, artifact, data, folder, pool
        self.out = folder / "run"

    def aggregate(self, **changes):
        return aggregate(self.artifact, **{**WORK, "mqtt": self.url, "out": self.out, "rounds": 2, **changes})

    def device(self):
        options = {"data": self.data, "id": "kitchen", "state": self.folder / "kitchen", "threads": 1}
        return self.pool.submit(device, self.artifact, mqtt=self.url, job="home", idle_limit_s=60, **options)

    def run(self):
        return json.loads((self.out / "run.json").read_text())

    def adapter_is(self, version):
        made = load_arrays(self.out / f"versions/{version:05d}.safetensors")
        kept = load_arrays(self.out / "adapter/adapter_model.safetensors")
        return all(kept[name].tobytes() == value.tobytes() for name, value in made.items())


@pytest.fixture
def home(mosquitto, word_artifact, word_file, tmp_path):
    with ThreadPoolExecutor() as pool:
        yield Home(mosquitto.url, word_artifact, word_file, tmp_path, pool)


def test_a_job_that_is_stopped_leaves_the_adapter_of_its_last_round_and_goes_on(home):
    def stop(row):
        if row.round == 1:
            assert home.adapter_is(1)
            raise SystemExit(143)

    kitchen, notes = home.device(), []
    with pytest.raises(SystemExit):
        home.aggregate(rounds=3, on_round=stop, on_note=notes.append)
    assert notes[-1] == "stopped with 1 of 3 rounds done; the same command goes on"
    report = home.run()["report"]
    assert (report["rounds"], report["finished"]) == (1, False)
    assert [row["devices"] for row in report["history"]] == [0, 1]
    assert home.adapter_is(1)
    assert not list(home.out.rglob(".*.part"))
    assert home.aggregate(rounds=3).rounds == 3
    assert kitchen.result().rounds == 3
    assert home.adapter_is(3)
    assert home.run()["report"]["finished"] is True


def test_a_finished_job_goes_on_with_more_rounds_and_so_does_its_device_though_it_comes_first(home):
    kitchen = home.device()
    assert home.aggregate(rounds=1).rounds == 1
    assert kitchen.result().reason == "1 rounds are done"
    kitchen = home.device()  # the retained status still says that the job is over
    report = home.aggregate(rounds=3)
    assert [(row.round, row.devices) for row in report.history] == [(0, 0), (1, 1), (2, 1), (3, 1)]
    assert (kitchen.result().rounds, kitchen.result().reason) == (2, "3 rounds are done")
    assert home.adapter_is(3)


def test_fewer_rounds_than_are_done_end_a_job_at_once(home):
    def stop(row):
        if row.round == 2:
            raise SystemExit(143)

    kitchen = home.device()
    with pytest.raises(SystemExit):
        home.aggregate(rounds=50, on_round=stop)
    report = home.aggregate(rounds=1)
    assert (report.rounds, report.finished) == (2, True)
    assert kitchen.result().rounds == 2
    notes = []
    assert home.aggregate(rounds=1, on_note=notes.append).history == report.history
    assert notes == [f"{home.out}: all of its 2 rounds were done before; with more --rounds it goes on"]
    assert home.adapter_is(2)


def test_what_makes_a_job_another_is_still_refused(home):
    kitchen = home.device()
    home.aggregate(rounds=1)
    kitchen.result()
    with pytest.raises(ConfigError, match=r"holds another job \(clients: 2, was 1; min"):
        home.aggregate(rounds=2, clients=2)


@pytest.mark.parametrize("server", ["mosquitto", "embedded"])
def test_a_second_aggregator_of_a_job_is_sent_away_and_the_first_goes_on(home, server, request):
    home.url = request.getfixturevalue(server).url
    at_work = Event()
    first = home.pool.submit(
        home.aggregate, rounds=1, on_note=lambda said: "direction" in said or at_work.set()
    )
    assert at_work.wait(30)
    try:
        with pytest.raises(ConfigError, match="another aggregator of job 'home' is at work"):
            home.aggregate(rounds=1, out=home.folder / "other", on_note=pytest.fail)
    finally:
        kitchen = home.device()
        assert first.result(60).rounds == 1
        assert kitchen.result().rounds == 1


def test_what_a_killed_aggregator_left_on_the_server_stops_nobody(home, monkeypatch):
    """It says online for ever: the server was away when the aggregator died."""
    monkeypatch.setattr(rivals, "ANSWER_S", 0.2)
    with Link(home.url, client_id="x", topics=[]) as link:
        status = AggregatorStatus(job="home", session="dead", online=True, round=1, version=0)
        link.publish(aggregator_topic("home"), encode(status), retain=True)
    kitchen = home.device()
    assert home.aggregate(rounds=1).rounds == 1
    kitchen.result()


@pytest.mark.parametrize("left", ["run.json", "adapter/adapter_config.json", "checkpoint.safetensors"])
def test_the_folder_of_another_command_is_refused_and_left_as_it_is(home, left):
    (home.out / left).parent.mkdir(parents=True)
    (home.out / left).write_text("mine")
    with pytest.raises(ConfigError, match=rf"{left.split('/')[0]} lie there and no ledger"):
        home.aggregate(on_note=pytest.fail)
    assert (home.out / left).read_text() == "mine"
    assert not (home.out / LEDGER).exists()


def test_a_round_for_the_head_and_one_that_trains_are_one_local_run_that_begins_with_it(home, tmp_path):
    kitchen = home.device()
    report = home.aggregate(head_start="class-mean", codec="fp32", rounds=2, local_steps=3)
    assert kitchen.result().rounds == 2
    assert [row.devices for row in report.history] == [0, 1, 1]
    work = {"steps": 3, "seq_len": 8, "threads": 1, "head_start": "class-mean"}
    train(home.artifact, data=home.data, out=tmp_path / "local", **work)
    local = load_arrays(tmp_path / "local/adapter/adapter_model.safetensors")
    federated = load_arrays(home.out / "adapter/adapter_model.safetensors")
    first = load_arrays(home.out / "versions/00000.safetensors")
    for name, value in local.items():
        np.testing.assert_allclose(federated[name], value, atol=1e-4, err_msg=name)
    assert np.abs(federated["head.weight"] - first["head.weight"]).max() > 0.1
    assert home.run()["arguments"]["job"]["head_start"] == "class-mean"


def test_a_job_does_not_go_on_with_another_head_start(home):
    kitchen = home.device()
    home.aggregate(rounds=1)
    kitchen.result()
    with pytest.raises(ConfigError, match="head_start: 'class-mean', was 'none'"):
        home.aggregate(rounds=2, head_start="class-mean")


@pytest.mark.parametrize("part", [{"frozen": "lora-a"}, {"rank": 2, "strategy": "product"}])
def test_a_part_of_a_lora_that_the_artifact_has_not_is_refused_before_a_server_is_asked(home, part):
    with pytest.raises(ConfigError, match=r"the artifact has no LoRA pairs \(lora_A with lora_B\)"):
        home.aggregate(mqtt="mqtt://nowhere.invalid", **part)
    assert not home.out.exists()


WHOLE = {"local_steps": 3, "batch_size": 120, "rounds": 1, "codec": "fp32", "lr": 0.01}
"""Every step takes all lines, so that no draw tells the runs apart."""


@pytest.mark.parametrize(("of_job", "own"), [("balanced", ""), ("a=5,b=0.5", ""), ("a=5", "balanced")])
def test_a_job_of_class_weights_trains_as_one_machine_with_them(home, tmp_path, of_job, own):
    lines = home.data.read_text().splitlines()
    kept = [line for i, line in enumerate(lines) if not line.endswith(",c") or i % 5 == 0]
    home.data = tmp_path / "skewed.csv"
    home.data.write_text("\n".join(kept) + "\n")
    options = {"state": tmp_path / "kitchen", "id": "kitchen", "threads": 1, "idle_limit_s": 60}
    kitchen = home.pool.submit(
        device, home.artifact, data=home.data, mqtt=home.url, job="home", class_weights=own, **options
    )
    report = home.aggregate(class_weights=of_job, **WHOLE)
    kitchen.result()
    work = {"steps": 3, "batch_size": 120, "seq_len": 8, "lr": 0.01, "threads": 1}
    federated = load_arrays(home.out / "adapter/adapter_model.safetensors")
    apart = {}
    for name, weights in {"weighted": own or of_job, "plain": ""}.items():
        run = tmp_path / name
        alone = train(home.artifact, data=home.data, out=run, class_weights=weights, **work)
        found = load_arrays(run / "adapter/adapter_model.safetensors")
        apart[name] = max(float(np.abs(found[n] - federated[n]).max()) for n in found)
        told = abs(report.history[-1].train_loss - np.mean(alone.losses))
        assert (told < 1e-5) == (name == "weighted")
    assert apart["weighted"] < 1e-5 < 1e-3 < apart["plain"]


@pytest.mark.parametrize(("given", "said"), [("x=2", "no label 'x'; have: a, b"), ("a=0", "a=0: expected")])
def test_class_weights_that_the_artifact_has_not_are_refused_before_a_server_is_asked(home, given, said):
    with pytest.raises(ConfigError, match=said):
        home.aggregate(mqtt="mqtt://nowhere.invalid", class_weights=given)
    with pytest.raises(ConfigError, match=said):
        device(home.artifact, data=home.data, mqtt="mqtt://nowhere.invalid", job="home", class_weights=given)
