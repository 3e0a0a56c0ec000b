"""Every draw that a run's result depends on, held to tests/data/draws.json: here exactly, and by plain JavaScript where node is.

``FLEETUNE_WRITE_GOLDEN=1 pytest tests/test_golden_draws.py`` writes the file anew: then every run means something else.
"""

import json
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fleetune.broker.jobs.work import device_seed
from fleetune.device_runtime import draws
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.data.samples import Ragged, make_dataset
from fleetune.device_runtime.draws import SEED_MAX, Draws, Key
from fleetune.device_runtime.methods.policies import POLICIES, make_gates, make_policy
from fleetune.device_runtime.methods.protection import EFFECTS
from fleetune.device_runtime.methods.schedules import SCHEDULES
from fleetune.device_runtime.methods.shapes import SHAPES, drop_rates

GOLDEN = Path(__file__).parent / "data" / "draws.json"
SCRIPT = Path(__file__).parent / "support" / "draws.mjs"
PLANNED = ("full", "bernoulli", "exact-k", "suffix", "successive", "cyclic")
"""Policies of 0.1.0, in a form of their own: their cases stay as they were."""
MIDDLE = [0.1, 0.2, 0.9, 0.4, 0.4, 0.7, 0.1, 0.1, 0.2, 0.3, 0.3, 0.0]
"""Skip effects of twelve layers, some of them equal."""
KEYS = [
    Key(0, "plans", 0),
    Key(7, "batches", 3, 1),
    Key(SEED_MAX, "devices", 2**32 - 1, 2**32 - 1),
    Key(5, "personal", 0),
]


def philox(counter, key):
    return draws.philox(np.array([counter], np.uint32), tuple(key))[0].tolist()


def words(key, count):
    return draws.words(Key(*key), count).tolist()


def uniforms(key, count):
    return draws.uniforms(Key(*key), count).tolist()


def permutation(key, count):
    return draws.permutation(Key(*key), count).tolist()


def weighted(key, weights, count):
    return draws.weighted(Key(*key), np.array(weights), count=count).tolist()


def batches(seed, epoch, batch_size, lengths):
    column = Ragged(np.zeros(sum(lengths), np.int64), np.array(lengths), 0, "int64")
    data = make_dataset({"input_ids": column}, np.array(lengths), seq_len=64, num_classes=2)
    return [batch.tolist() for batch in data.epoch_batches(seed, epoch, batch_size)]


def rates(num_layers, drop, shape):
    return drop_rates(num_layers, drop=drop, shape=shape).tolist()


def plans(policy, num_layers, seed, steps):
    made, state = make_policy(msgspec.convert(policy, PolicySpec), num_layers), {}
    return [[int(mode) for mode in made(step, Draws(seed, "plans", step), state)] for step in range(steps)]


def schedule(spec, num_layers, seed, steps, effects):
    made, state = make_policy(msgspec.convert(spec, PolicySpec), num_layers), {EFFECTS: effects}
    return [[int(mode) for mode in made(step, Draws(seed, "plans", step), state)] for step in steps]


def gates(spec, num_layers, seed, steps, effects, num_rows):
    """The rows that run through each layer, after the plan of the step."""
    spec = msgspec.convert(spec, PolicySpec)
    made, rows_of, state = make_policy(spec, num_layers), make_gates(spec, num_layers), {EFFECTS: effects}
    found = []
    for step in steps:
        drawn = Draws(seed, "plans", step)
        made(step, drawn, state)
        rows = rows_of(step, drawn, state, num_rows)
        found.append([np.flatnonzero(row).tolist() for row in rows])
    return found


def examples(seed, num_samples):
    return draws.permutation(Key(seed, "effects", 0), num_samples)[:100].tolist()


def device_seeds(seed, places):
    return [device_seed(seed, round_number=number, position=position) for number, position in places]


def selection(seed, number, asked, present, paused, limit):
    """tests/broker/test_rounds.py holds the aggregator to this."""
    order = draws.permutation(Key(seed, "selection", number, asked), len(present)).tolist()
    chosen = sorted(order, key=lambda i: present[i] in paused)[:limit]
    return [present[i] for i in sorted(chosen)]


def cases():
    """Name and arguments of every case."""
    yield from (
        ("philox", {"counter": c, "key": k}) for c, k in (([0] * 4, [0, 0]), ([1, 2, 3, 4], [5, 2**32 - 1]))
    )
    for key in KEYS:
        yield "words", {"key": key, "count": 6}
        yield "uniforms", {"key": key, "count": 5}
        yield "permutation", {"key": key, "count": 40}
        yield "weighted", {"key": key, "weights": [0.05, 1.0, 0.3, 0.0, 2.5, 1 / 3], "count": 5}
    lengths = [1 + i * i % 61 for i in range(150)]
    yield "batches", {"seed": 3, "epoch": 0, "batch_size": 2, "lengths": lengths}
    yield "batches", {"seed": 3, "epoch": 1, "batch_size": 7, "lengths": lengths}
    for shape in SHAPES:
        for num_layers, drop in ((1, 0.5), (6, 0.5), (24, 0.3), (129, 0.9)):
            yield "rates", {"num_layers": num_layers, "drop": drop, "shape": shape}
    yield from (("plans", case) for name in PLANNED for case in policies(name))
    yield from (("schedule", case) for case in scheduled())
    yield from (("gates", case) for case in gated())
    yield "examples", {"seed": 4, "num_samples": 120}
    places = [[1, 0], [1, 1], [2, 0], [20, 999]]
    yield from (("device_seeds", {"seed": seed, "places": places}) for seed in (0, 1))
    yield from (("selection", case) for case in selections())


def policies(name):
    """As they were written when a spec had four fields."""
    uses, given = POLICIES[name].uses, {"num_layers": 12, "seed": 5, "steps": 12}
    for shape in SHAPES if "shape" in uses else ["uniform"]:
        spec = PolicySpec(name=name, drop=0.4 * ("drop" in uses), shape=shape, period=2 * ("period" in uses))
        yield {"policy": _four(spec), **given}
    if name == "bernoulli":  # often none is left, and one is drawn to survive
        yield {
            "policy": _four(PolicySpec(name=name, drop=0.9, shape="decay")),
            **given,
            "num_layers": 2,
        }


def _four(spec):
    return {name: getattr(spec, name) for name in ("name", "drop", "shape", "period")}


def scheduled():
    """Every policy that draws or grows, under every schedule and protection, with and without a width."""
    given = {"num_layers": 12, "seed": 5, "steps": [*range(10), 15, 19, 20, 21], "effects": MIDDLE}
    for name, schedule, protect in product(
        ("bernoulli", "exact-k", "dropbp", "coto"), SCHEDULES, ("ends", "effect")
    ):
        horizon, width = 20 * (schedule != "constant"), 8 * (name in ("dropbp", "coto") and protect == "ends")
        spec = PolicySpec(
            name=name,
            drop=0.45,
            shape="incremental",
            schedule=schedule,
            horizon=horizon,
            protected=3,
            protect=protect,
            width=width,
        )
        yield {"spec": msgspec.to_builtins(spec), **given}
    for spec in (
        PolicySpec(name="growing", drop=0.2, period=3, width=4),
        PolicySpec(name="block", width=3, first=2),
        PolicySpec(name="coto", drop=0.95, width=2),
    ):
        yield {"spec": msgspec.to_builtins(spec), **given}


def gated():
    given = {"num_layers": 12, "seed": 5, "steps": [0, 7, 20], "effects": MIDDLE, "num_rows": 7}
    for name, schedule in product(("bernoulli", "exact-k"), ("constant", "falling")):
        horizon = 20 * (schedule != "constant")
        spec = PolicySpec(
            name=name,
            drop=0.5,
            gates="row",
            schedule=schedule,
            horizon=horizon,
            protected=2,
            protect="effect",
        )
        yield {"spec": msgspec.to_builtins(spec), **given}
    alone = PolicySpec(name="bernoulli", drop=0.9, gates="row")
    yield {"spec": msgspec.to_builtins(alone), **given, "num_rows": 1}


def selections():
    """Three of nine; five of nine of whom five are paused; and one more in that round, of those not asked."""
    here, given = [f"d{i}" for i in range(9)], {"seed": 0, "number": 2}
    five = {**given, "asked": 0, "present": here, "paused": ["d1", "d4", "d5", "d7", "d8"], "limit": 5}
    left = sorted({*here} - {*selection(**five)})
    yield {**five, "paused": [], "limit": 3}
    yield five
    yield {**five, "asked": 5, "present": left, "limit": 1}


def made():
    cased = [(name, json.loads(json.dumps(given))) for name, given in cases()]
    return [{"name": name, "given": given, "drawn": globals()[name](**given)} for name, given in cased]


def test_draws_are_those_of_the_golden_file():
    if os.environ.get("FLEETUNE_WRITE_GOLDEN"):
        GOLDEN.write_text(
            "[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in made()) + "\n]\n"
        )
    golden, now = json.loads(GOLDEN.read_text()), made()
    assert [case["name"] for case in golden] == [case["name"] for case in now]
    for want, got in zip(golden, now, strict=True):
        assert got == want


def test_the_rarest_branch_is_in_the_golden_file():
    """All layers fall, and one is drawn to survive."""
    golden = [case for case in json.loads(GOLDEN.read_text()) if case["name"] == "plans"]
    two = next(case for case in golden if case["given"]["num_layers"] == 2)
    falls = [
        (draws.uniforms(Key(5, "plans", i), 2) < rates(2, 0.9, "decay")).all()
        for i in range(len(two["drawn"]))
    ]
    assert any(falls)


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_plain_javascript_draws_the_same(tmp_path):
    def run(path):
        return subprocess.run(["node", str(SCRIPT), str(path)], capture_output=True, text=True, check=False)

    golden = json.loads(GOLDEN.read_text())
    done = run(GOLDEN)
    assert (done.returncode, done.stdout.strip()) == (0, f"{len(golden)} cases agree"), done.stderr
    golden[-1]["drawn"] = golden[-1]["given"]["present"]
    (tmp_path / "changed.json").write_text(json.dumps(golden))
    assert run(tmp_path / "changed.json").returncode == 1
