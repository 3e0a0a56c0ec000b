"""Who sees the page, and what a stranger's text does in it."""

import json
import re
import threading
from contextlib import contextmanager
from http.client import HTTPConnection

import browser
import pytest
from fleetune_metrics import samples_of

from fleetune.device_runtime.contracts.wire import RoundFigures
from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.watching.metrics import exposition
from fleetune.toolkit.watching.server import check_token, make_server
from fleetune.toolkit.watching.state import DeviceState, FleetState, JobState

TOKEN = "a-token-that-nobody-guesses"
EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def fleet_of(*devices, **job):
    known = {"job": "home", "aggregator": "here", "is_told": True, "num_rounds": 3, **job}
    rounds = [
        RoundFigures(round=n, devices=2, measured={"loss": 1.0 - n / 4, "accuracy": n / 4}) for n in range(3)
    ]
    return FleetState(job=JobState(**known), counts={"training": 1}, devices=list(devices), rounds=rounds)


def device_of(name, **changes):
    known = {
        "state": "training",
        "is_online": True,
        "phase": "training",
        "step": 3,
        "steps": 8,
        "memory_mb": 103.5,
    }
    return DeviceState(device_id=name, **{**known, **changes})


@contextmanager
def served(state):
    server = make_server("127.0.0.1", 0, token=TOKEN, state=lambda: state)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def get(port, path, *, method="GET", **headers):
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_without_the_token_nobody_sees_anything():
    with served(fleet_of(device_of("kitchen"))) as port:
        for path in (
            "/",
            "/state.json",
            "/metrics",
            "/nothing",
            f"/?token={TOKEN[:-1]}",
            f"/?token={TOKEN}x",
            "/?token=%ff",
        ):
            answer, content = get(port, path)
            assert (answer.status, b"kitchen" in content, b"home" in content) == (401, False, False), path
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert get(port, "/metrics", Authorization="Bearer wrong")[0].status == 401
        assert get(port, f"/metrics?token={TOKEN}", Authorization="Bearer wrong")[0].status == 401
        assert get(port, "/", method="POST")[0].status == 501
        assert get(port, "/", method="HEAD")[0].status == 401


def test_with_the_token_page_state_and_metrics_are_there():
    with served(fleet_of(device_of("kitchen"))) as port:
        page, content = get(port, f"/?token={TOKEN}")
        policy = page.headers["Content-Security-Policy"]
        nonce = re.search(r"script-src 'nonce-([^']+)'", policy).group(1)
        assert policy.startswith("default-src 'none'; ")
        assert content.count(f'nonce="{nonce}"'.encode()) == 2
        assert not re.search(rb'(src|href)="|url\(|@import', content), "nothing is fetched from anywhere"
        assert get(port, f"/?token={TOKEN}")[0].headers["Content-Security-Policy"] != policy
        state = json.loads(get(port, f"/state.json?token={TOKEN}")[1])
        assert state["devices"][0]["device_id"] == "kitchen"
        metrics = get(port, "/metrics", Authorization=f"Bearer {TOKEN}")
        assert b'fleetune_device_up{job="home",device="kitchen"} 1.0' in metrics[1]
        assert get(port, f"/else?token={TOKEN}")[0].status == 404
        assert get(port, f"/?token={TOKEN}", method="HEAD")[1] == b""


@pytest.mark.parametrize("token", ["short", "with spaces in it, and long", "ünglücklich-und-lang-genug"])
def test_a_token_that_is_guessed_or_breaks_the_address_is_refused(token):
    with pytest.raises(ConfigError, match="use at least 16 letters"):
        check_token(token)


def test_metrics_are_read_back_whatever_a_device_is_called():
    samples = samples_of(exposition(fleet_of(device_of('a"b\\c\nd', temperature_c=51.5, mb_sent=2.0))))
    of_device = {
        name: value for (name, labels), value in samples.items() if dict(labels).get("device") == 'a"b\\c\nd'
    }
    assert of_device["fleetune_device_temperature_celsius"] == 51.5
    assert of_device["fleetune_device_memory_bytes"] == 103.5e6
    assert of_device["fleetune_device_sent_bytes_total"] == 2e6
    assert samples["fleetune_accuracy", (("job", "home"),)] == 0.5
    assert ("fleetune_epsilon", (("job", "home"),)) not in samples


@browser.needs_browser
def test_a_browser_shows_the_fleet_and_runs_nothing_that_a_device_says():
    devices = [
        device_of("kitchen", said=EVIL, why=EVIL, software=EVIL),
        device_of(EVIL, state=EVIL, phase=EVIL),
    ]
    with served(fleet_of(*devices, software=EVIL)) as port:
        document, log = browser.dump(f"http://127.0.0.1:{port}/?token={TOKEN}")
        assert "<title>home: fleetune watch</title>" in document
        assert browser.states(document)["kitchen"] == "training"
        assert "3 of 8" in document
        assert document.count("<polyline") == 5, "loss, accuracy, bytes both ways, seconds"
        assert document.count("<script") == 1
        assert "<img" not in document
        assert "&lt;script&gt;" in document
        assert log == "", "nothing was blocked, and nothing failed"
        assert TOKEN not in re.sub(r"\?token=[^\"]*", "", document)
