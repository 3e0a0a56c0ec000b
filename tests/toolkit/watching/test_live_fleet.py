"""Eight real devices and a real browser: who is killed, paused, slow or stopped is seen.

FLEETUNE_SCREENSHOTS=DIR keeps the page's pictures, light and dark.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import browser
import children
import pytest
from pretended import PretendedSystem
from processes import Processes, environment
from waiting import until

NAMES = ("attic", "balcony", "cellar", "garage", "hall", "kitchen", "porch")
HOT = {"temperature": {"max_c": 70}, "period_s": 0, "resume_after_s": 0}


@pytest.fixture
def fleet(tmp_path, word_artifact, word_file, mosquitto):
    """Seven devices that train, one of them slow, and one that evaluates."""
    processes = Processes(tmp_path, word_artifact)
    job = {"mqtt": mosquitto.url, "job": "home"}
    fields = {
        "rounds": 30,
        "clients": 7,
        "min_clients": 4,
        "deadline_s": 120,
        "local_steps": 20,
        "grace_s": 2,
    }
    processes.start("aggregator", "aggregate", {**job, **fields, "out": str(tmp_path / "run")})
    host = PretendedSystem(tmp_path / "host")
    host.zone(60)
    for name in (*NAMES, "judge"):
        options = {**job, "id": name, "data": str(word_file), "state": str(tmp_path / name), "pace_s": 0.2}
        changes = {
            "garage": {"rules": {**HOT, "root": str(host.root)}},
            "porch": {"pace_s": 2.0},
            "judge": {"role": "evaluate"},
        }
        processes.start(name, "device", options | changes.get(name, {}), module="paced")
    yield processes, host
    processes.close()


def fleetune(*words, url):
    command = [sys.executable, "-m", "fleetune", *words, "--mqtt", url, "--job", "home"]
    return children.start(command, stdout=subprocess.PIPE, text=True, env=environment())


@pytest.mark.slow
@browser.needs_browser
def test_killed_paused_slow_and_stopped_devices_are_seen_in_the_page(fleet, mosquitto):
    processes, host = fleet
    watch = fleetune("watch", "--port", "0", url=mosquitto.url)
    address = watch.stdout.readline().strip()
    seen = {}

    def page():
        document, log = browser.dump(address)
        assert log == ""
        seen.clear()
        seen.update(browser.states(document))
        return document

    def is_seen(**wanted):
        def look():
            page()
            return wanted.items() <= seen.items()

        until(look, 150, saying=lambda: f"{seen}, not {wanted}")

    is_seen(porch="slow")
    assert set(seen) == {*NAMES, "judge"}
    rounds = "round 5 of" if os.environ.get("FLEETUNE_SCREENSHOTS") else "round 1 of"
    until(lambda: rounds in page(), 450)
    processes.kill("cellar")
    host.zone(90)
    is_seen(cellar="gone", garage="paused", porch="slow")
    if folder := os.environ.get("FLEETUNE_SCREENSHOTS"):
        for theme in ("light", "dark"):
            browser.screenshot(
                f"{address}&theme={theme}", Path(folder) / f"watch-{theme}.png", size="1280,680"
            )
    processes.pause("hall")
    until(lambda: page() and seen["hall"] in ("silent", "gone"), 150, saying=lambda: str(seen))
    told = json.loads(
        fleetune("status", "--json", url=mosquitto.url).communicate(timeout=60)[0].splitlines()[-1]
    )
    states = {device["device_id"]: device["state"] for device in told["devices"]}
    assert (states["cellar"], states["garage"]) == ("gone", "paused")
    assert told["job"]["num_rounds"] == 30
    watch.terminate()
    assert watch.wait(20) == 143
