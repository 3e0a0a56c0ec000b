// The draws of docs/draws.md as web_demo/engine has them in plain JavaScript, held to tests/data/draws.json: node draws.mjs FILE
import assert from "node:assert";
import { readFileSync } from "node:fs";
import * as draws from "../../web_demo/engine/draws.mjs";
import { drawsOf, makeGates, PLAIN_POLICY, POLICIES, rates } from "../../web_demo/engine/policies.mjs";

const made = (policy, n) => POLICIES[policy.name].make(n, { ...PLAIN_POLICY, ...policy });

const DRAWS = {
  philox: ({ counter, key }) => draws.philox(counter, key),
  words: ({ key, count }) => [...draws.words(key, count)],
  uniforms: ({ key, count }) => draws.uniforms(key, count),
  permutation: ({ key, count }) => draws.permutation(key, count),
  weighted: ({ key, weights, count }) => draws.weighted(key, weights, count),
  batches: ({ seed, epoch, batch_size, lengths }) => draws.batches(seed, epoch, batch_size, lengths),
  rates: ({ num_layers, drop, shape }) => rates(num_layers, drop, shape),
  plans: ({ policy, num_layers, seed, steps }) => {
    const plan = made(policy, num_layers);
    return Array.from({ length: steps }, (_, step) => plan(step, drawsOf(seed, step)));
  },
  schedule: ({ spec, num_layers, seed, steps, effects }) => {
    const plan = made(spec, num_layers);
    return steps.map((step) => plan(step, drawsOf(seed, step), effects));
  },
  gates: ({ spec, num_layers, seed, steps, effects, num_rows }) => {
    const plan = made(spec, num_layers), rows = makeGates({ ...PLAIN_POLICY, ...spec }, num_layers);
    return steps.map((step) => {
      const drawn = drawsOf(seed, step);
      plan(step, drawn, effects);
      return rows(step, drawn, effects, num_rows);
    });
  },
  examples: ({ seed, num_samples }) => draws.permutation([seed, "effects", 0, 0], num_samples).slice(0, 100),
  device_seeds: ({ seed, places }) => {
    const draw = (round, position) => draws.integers([seed, "devices", round, position], 1)[0];
    return places.map(([round, position]) => (round === 1 && position === 0 ? seed : draw(round, position)));
  },
  selection: ({ seed, number, asked, present, paused, limit }) => {
    const order = draws.permutation([seed, "selection", number, asked], present.length);
    order.sort((a, b) => paused.includes(present[a]) - paused.includes(present[b]));
    return order.slice(0, limit).sort((a, b) => a - b).map((i) => present[i]);
  },
};
const cases = JSON.parse(readFileSync(process.argv[2], "utf8"));
for (const { name, given, drawn } of cases) assert.deepStrictEqual(DRAWS[name](given), drawn, name);
console.log(`${cases.length} cases agree`);
