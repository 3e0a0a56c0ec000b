// Every draw of docs/draws.md in plain JavaScript, held to tests/data/draws.json: node draws.mjs FILE
import assert from "node:assert";
import { readFileSync } from "node:fs";

const STREAMS = {
  plans: 1, batches: 2, selection: 3, devices: 4, personal: 5, effects: 9, configurator: 10, "held-out": 11,
};
const DROP = 0, FORWARD = 1, TRAIN = 2, BYPASS = 3, BARE = 4;
const RATE_MAX = 0.95;

function philox({ counter, key }) {
  let [c0, c1, c2, c3] = counter, [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const left = 0xd2511f53n * BigInt(c0), right = 0xcd9e8d57n * BigInt(c2);
    c0 = (Number(right >> 32n) ^ c1 ^ k0) >>> 0;
    c1 = Number(right & 0xffffffffn);
    c2 = (Number(left >> 32n) ^ c3 ^ k1) >>> 0;
    c3 = Number(left & 0xffffffffn);
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

function words({ key: [seed, stream, number, part], count }) {
  const halves = [seed % 2 ** 32, Math.floor(seed / 2 ** 32)], drawn = [];
  for (let i = 0; drawn.length < count; i++)
    drawn.push(...philox({ counter: [i, number, part, STREAMS[stream]], key: halves }));
  return drawn.slice(0, count);
}

function integers({ key, count }) {
  const w = words({ key, count: 2 * count });
  return Array.from({ length: count }, (_, i) => (w[2 * i] >>> 5) * 2 ** 26 + (w[2 * i + 1] >>> 6));
}

const uniforms = (given) => integers(given).map((n) => n / 2 ** 53);

function permutation({ key, count }) {
  const drawn = integers({ key, count });
  return [...drawn.keys()].sort((a, b) => drawn[a] - drawn[b] || a - b);
}

function weighted({ key, weights, count }) {
  const left = [...weights];
  return uniforms({ key, count }).map((u) => {
    const total = left.reduce((sum, w) => sum + w, 0);
    let place = 0, sum = left[0];
    while (!(sum > u * total)) sum += left[++place];
    left[place] = 0;
    return place;
  });
}

function cut(rows, size) {
  const parts = [];
  for (let start = 0; start < rows.length; start += size) parts.push(rows.slice(start, start + size));
  return parts;
}

function batches({ seed, epoch, batch_size, lengths }) {
  const order = permutation({ key: [seed, "batches", epoch, 0], count: lengths.length });
  const windows = cut(order, 32 * batch_size);
  const all = windows.flatMap((rows) => cut(rows.sort((a, b) => lengths[a] - lengths[b]), batch_size));
  return permutation({ key: [seed, "batches", epoch, 1], count: all.length }).map((i) => all[i]);
}

function expOfMinus(x) {
  const y = x / 16;
  let series = 1;
  for (let j = 12; j > 0; j--) series = 1 + (y * series) / j;
  for (let i = 0; i < 4; i++) series = series * series;
  return 1 / series;
}

const SHAPES = {
  uniform: () => 1,
  incremental: (i, n) => (i + 1) / n,
  decay: (i, n) => (n - i) / n,
  normal: (i, n) => {
    const offset = (i - (n - 1) / 2) / (n / 6);
    return expOfMinus(0.5 * (offset * offset));
  },
};

function rates({ num_layers, drop, shape, stays = [] }) {
  const weights = span(0, num_layers).map((i) => (stays.includes(i) ? 0 : SHAPES[shape](i, num_layers)));
  if (!drop || weights.every((w) => w === 0)) return weights.map(() => 0);
  const at = (m) => weights.map((w) => Math.min(m * w, RATE_MAX));
  let low = 0, high = RATE_MAX / Math.min(...weights.filter((w) => w > 0));
  for (let i = 0; i < 80; i++) {
    const middle = (low + high) / 2;
    if (at(middle).reduce((sum, r) => sum + r, 0) / num_layers < drop) low = middle;
    else high = middle;
  }
  return at(high);
}

function halfToEven(exact) {
  const below = Math.floor(exact), even = below % 2 === 0 ? below : below + 1;
  return exact - below === 0.5 ? even : Math.round(exact);
}

const numKept = (n, drop) => Math.max(1, halfToEven(n * (1 - drop)));
const training = (n, layers, rest) => Array.from({ length: n }, (_, i) => (layers.includes(i) ? TRAIN : rest));
const span = (first, size) => Array.from({ length: size }, (_, i) => first + i);

function groups(n, { drop }) {
  const size = numKept(n, drop), last = n - size, firsts = [];
  for (let first = 0; first < last; first += size) firsts.push(first);
  return [...firsts, last].map((first) => training(n, span(first, size), FORWARD));
}

const SCHEDULES = {
  constant: (drop) => drop,
  falling: (drop, horizon, step) => (step < horizon ? (drop * (horizon - step)) / horizon : 0),
  tail: (drop, horizon, step) => (step < horizon ? drop : 0),
};

function chances(n, spec, step, effects) {
  const lowest = n - (spec.width || n), size = n - lowest;
  const order = span(0, size).map((i) => lowest + (i % 2 ? (i - 1) / 2 : size - 1 - i / 2));
  if (spec.protect === "effect") order.sort((a, b) => effects[b] - effects[a]); // stable
  const stays = order.slice(0, spec.protected ?? 0).map((layer) => layer - lowest);
  const drop = SCHEDULES[spec.schedule ?? "constant"](spec.drop, spec.horizon, step);
  return { lowest, size, stays, drop, rate: rates({ num_layers: size, drop, shape: spec.shape, stays }) };
}

const above = (lowest, plan) => [...span(0, lowest).map(() => FORWARD), ...plan];

const oneByOne = (out) => (n, spec) => (step, seed, effects) => {
  if (spec.gates === "row") return training(n, span(0, n), DROP);
  const { lowest, size, rate } = chances(n, spec, step, effects);
  const drawn = uniforms({ key: [seed, "plans", step, 0], count: size });
  let kept = span(0, size).filter((i) => !(drawn[i] < rate[i]));
  if (!kept.length) kept = weighted({ key: [seed, "plans", step, 1], weights: rate.map((r) => 1 - r), count: 1 });
  return above(lowest, training(size, kept, out));
};

const soMany = (out) => (n, spec) => (step, seed, effects) => {
  if (spec.gates === "row") return training(n, span(0, n), DROP);
  const { lowest, size, stays, drop, rate } = chances(n, spec, step, effects);
  const weights = rate.map((r, i) => (stays.includes(i) ? 0 : 1 - r));
  const drawn = weighted({ key: [seed, "plans", step, 0], weights, count: numKept(size, drop) - stays.length });
  return above(lowest, training(size, [...stays, ...drawn], out));
};

const POLICIES = {
  full: (n) => () => training(n, span(0, n), DROP),
  bernoulli: oneByOne(DROP),
  "exact-k": soMany(DROP),
  dropbp: soMany(BYPASS),
  coto: oneByOne(BARE),
  growing: (n, { drop, period, width }) => (step) => {
    const count = Math.min(width * (1 + Math.floor(step / period)), numKept(n, drop));
    return training(n, span(n - count, count), FORWARD);
  },
  block: (n, { first, width }) => () => training(n, span(first, width), FORWARD),
  suffix: (n, { drop }) => () => training(n, span(n - numKept(n, drop), numKept(n, drop)), FORWARD),
  successive: (n, spec) => (step) => {
    const plans = groups(n, spec);
    return plans[Math.min(Math.floor(step / spec.period), plans.length - 1)];
  },
  cyclic: (n, spec) => (step) => {
    const plans = groups(n, spec);
    return plans[Math.floor(step / spec.period) % plans.length];
  },
};

function plans({ policy, num_layers, seed, steps }) {
  const plan = POLICIES[policy.name](num_layers, policy);
  return span(0, steps).map((step) => plan(step, seed));
}

function schedule({ spec, num_layers, seed, steps, effects }) {
  const plan = POLICIES[spec.name](num_layers, spec);
  return steps.map((step) => plan(step, seed, effects));
}

function gates({ spec, num_layers, seed, steps, effects, num_rows }) {
  return steps.map((step) => {
    const { stays, rate } = chances(num_layers, spec, step, effects), key = (part) => [seed, "plans", step, part];
    let part = 0;
    const runs = rate.map((r, layer) => {
      if (stays.includes(layer)) return span(0, num_rows);
      const order = permutation({ key: key(part++), count: num_rows });
      return order.slice(0, halfToEven(num_rows * (1 - r))).sort((a, b) => a - b);
    });
    if (runs.some((rows) => rows.length)) return runs;
    const [one] = weighted({ key: key(part), weights: rate.map((r) => 1 - r), count: 1 });
    return runs.map((_, layer) => (layer === one ? span(0, num_rows) : []));
  });
}

const examples = ({ seed, num_samples }) =>
  permutation({ key: [seed, "effects", 0, 0], count: num_samples }).slice(0, 100);

function device_seeds({ seed, places }) {
  const draw = (round, position) => integers({ key: [seed, "devices", round, position], count: 1 })[0];
  return places.map(([round, position]) => (round === 1 && position === 0 ? seed : draw(round, position)));
}

function selection({ seed, number, asked, present, paused, limit }) {
  const order = permutation({ key: [seed, "selection", number, asked], count: present.length });
  order.sort((a, b) => paused.includes(present[a]) - paused.includes(present[b]));
  return order.slice(0, limit).sort((a, b) => a - b).map((i) => present[i]);
}

const DRAWS = {
  philox, words, uniforms, permutation, weighted, batches, rates, plans, schedule, gates, examples, device_seeds, selection,
};
const cases = JSON.parse(readFileSync(process.argv[2], "utf8"));
for (const { name, given, drawn } of cases) assert.deepStrictEqual(DRAWS[name](given), drawn, name);
console.log(`${cases.length} cases agree`);
