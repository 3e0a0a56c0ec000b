"""What a page's codec owes, round by round, as ``tests/device_runtime/agent/test_codec_memory.py`` has it of Python's."""

import json
import subprocess

import pytest
from node_web import NODE, WEB, needs_web

pytestmark = needs_web

SETTLED = """
const { CodecMemory } = await import(`${process.argv[1]}/device/memory.mjs`);
const { Deliveries } = await import(`${process.argv[1]}/device/deliveries.mjs`);
const { accepted, newest, waiting } = JSON.parse(process.argv[2]), kept = new Map();
const keys = async (start) => [...kept.keys()].filter((key) => key.startsWith(start)).sort();
const store = { keys, get: async (key) => kept.get(key) };
const home = { key: (name) => name, store }, memory = new CodecMemory(home), deliveries = new Deliveries(home);
for (const round of [1, 2, 3, 7]) for (const [key, value] of Object.entries(memory.kept(round, { round }))) kept.set(key, value);
deliveries.parcels = waiting.map((round) => ({ header: { round } }));
for (const key of Object.keys(await memory.settled(2, accepted, Math.max(newest, deliveries.newestRound)))) kept.delete(key);
console.log(JSON.stringify([...kept.values()].map(({ round }) => round)));
"""


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ({"accepted": True, "newest": -1, "waiting": []}, [2]),
        ({"accepted": False, "newest": -1, "waiting": []}, [1]),
        ({"accepted": True, "newest": 3, "waiting": []}, [2, 3]),
        ({"accepted": True, "newest": -1, "waiting": [3]}, [2, 3]),
        ({"accepted": False, "newest": 3, "waiting": []}, [1, 3]),
    ],
)
def test_a_late_verdict_leaves_later_rounds_of_this_run_and_voids_an_earlier_run_s(said, left):
    done = subprocess.run(
        [NODE, "--input-type=module", "-e", SETTLED, WEB, json.dumps(said)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == left
