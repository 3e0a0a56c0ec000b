/** Layer policies: each step's plan, and the rows that run through each layer, draw for draw as Python's `methods/policies`. */
import { halfToEven } from "./arrays.mjs";
import { Draws } from "./draws.mjs";
import { ConfigError } from "./errors.mjs";
import { BARE, BYPASS, DROP, FORWARD, frozen, full, span, TRAIN } from "./plans.mjs";

const RATE_MAX = 0.95;

/** @typedef {{name: string, drop: number, shape: string, period: number, schedule: string, horizon: number, protected: number,
 *   protect: string, gates: string, width: number, first: number}} PolicySpec */
/** @callback Policy @param {number} step through all rounds @param {Draws} draws of this step @param {number[]} effects @returns {number[]} */

export const SHAPES = {
  uniform: () => 1,
  incremental: (i, n) => (i + 1) / n,
  decay: (i, n) => (n - i) / n,
  normal: (i, n) => {
    const offset = (i - (n - 1) / 2) / (n / 6);
    return expOfMinus(0.5 * (offset * offset));
  },
};

export const SCHEDULES = {
  constant: (drop) => drop,
  falling: (drop, horizon, step) => (step < horizon ? (drop * (horizon - step)) / horizon : 0),
  tail: (drop, horizon, step) => (step < horizon ? drop : 0),
};

/** By + * / alone: a library's `exp` differs in its last bit from another's. */
function expOfMinus(x) {
  const y = x / 16;
  let series = 1;
  for (let j = 12; j > 0; j--) series = 1 + (y * series) / j;
  for (let i = 0; i < 4; i++) series = series * series;
  return 1 / series;
}

/** How often each layer falls; layers that stay have rate 0 and count in the mean. */
export function rates(n, drop, shape, stays = []) {
  const weights = span(0, n).map((i) => (stays.includes(i) ? 0 : SHAPES[shape](i, n)));
  if (!drop || weights.every((w) => w === 0)) return weights.map(() => 0);
  const at = (m) => weights.map((w) => Math.min(m * w, RATE_MAX));
  let low = 0, high = RATE_MAX / Math.min(...weights.filter((w) => w > 0));
  for (let i = 0; i < 80; i++) {
    const middle = (low + high) / 2;
    if (at(middle).reduce((sum, r) => sum + r, 0) / n < drop) low = middle;
    else high = middle;
  }
  return at(high);
}

/** Layers that `exact-k` keeps. */
export const numKept = (n, drop) => Math.max(1, halfToEven(n * (1 - drop)));

const training = (n, layers, rest) => span(0, n).map((i) => (layers.includes(i) ? TRAIN : rest));

function groups(n, { drop }) {
  const size = numKept(n, drop), last = n - size, firsts = [];
  for (let first = 0; first < last; first += size) firsts.push(first);
  return [...firsts, last].map((first) => training(n, span(first, size), FORWARD));
}

function chances(n, spec, step, effects) {
  const lowest = n - (spec.width || n), size = n - lowest;
  const order = span(0, size).map((i) => lowest + (i % 2 ? (i - 1) / 2 : size - 1 - i / 2));
  if (spec.protected && spec.protect === "effect") order.sort((a, b) => effects[b] - effects[a]); // stable
  const stays = order.slice(0, spec.protected ?? 0).map((layer) => layer - lowest);
  const drop = SCHEDULES[spec.schedule ?? "constant"](spec.drop, spec.horizon, step);
  return { lowest, size, stays, drop, rate: rates(size, drop, spec.shape, stays) };
}

const above = (lowest, plan) => [...frozen(lowest), ...plan];

const oneByOne = (out) => (n, spec) => (step, draws, effects) => {
  if (spec.gates === "row") return full(n);
  const { lowest, size, rate } = chances(n, spec, step, effects), drawn = draws.uniforms(size);
  let kept = span(0, size).filter((i) => !(drawn[i] < rate[i]));
  if (!kept.length) kept = draws.weighted(rate.map((r) => 1 - r), 1);
  return above(lowest, training(size, kept, out));
};

const soMany = (out) => (n, spec) => (step, draws, effects) => {
  if (spec.gates === "row") return full(n);
  const { lowest, size, stays, drop, rate } = chances(n, spec, step, effects);
  const weights = rate.map((r, i) => (stays.includes(i) ? 0 : 1 - r));
  return above(lowest, training(size, [...stays, ...draws.weighted(weights, numKept(size, drop) - stays.length)], out));
};

const still = (n, layers) => {
  const plan = training(n, layers, FORWARD);
  return () => plan;
};

const DRAWN = ["drop", "shape", "schedule", "horizon", "protected", "protect"];

/** By name: what makes a policy of (layers, spec), and the fields that it has a use for. */
export const POLICIES = {
  full: { make: (n) => () => full(n), uses: [] },
  head: { make: (n) => () => frozen(n), uses: [] },
  bernoulli: { make: oneByOne(DROP), uses: [...DRAWN, "gates"] },
  "exact-k": { make: soMany(DROP), uses: [...DRAWN, "gates"] },
  dropbp: { make: soMany(BYPASS), uses: [...DRAWN, "width"] },
  coto: { make: oneByOne(BARE), uses: [...DRAWN, "width"] },
  suffix: { make: (n, { drop }) => still(n, span(n - numKept(n, drop), numKept(n, drop))), uses: ["drop"] },
  growing: {
    make: (n, { drop, period, width }) => (step) => {
      const count = Math.min(width * (1 + Math.floor(step / period)), numKept(n, drop));
      return training(n, span(n - count, count), FORWARD);
    },
    uses: ["drop", "period", "width"],
  },
  block: { make: (n, { first, width }) => still(n, span(first, width)), uses: ["width", "first"] },
  successive: {
    make: (n, spec) => (step) => {
      const plans = groups(n, spec);
      return plans[Math.min(Math.floor(step / spec.period), plans.length - 1)];
    },
    uses: ["drop", "period"],
  },
  cyclic: {
    make: (n, spec) => (step) => {
      const plans = groups(n, spec);
      return plans[Math.floor(step / spec.period) % plans.length];
    },
    uses: ["drop", "period"],
  },
};

export const PLAIN_POLICY = {
  name: "full", drop: 0, shape: "uniform", period: 0, schedule: "constant", horizon: 0, protected: 0, protect: "ends", gates: "batch",
  width: 0, first: 0,
};

/** @param {PolicySpec} spec @param {number} n layers @returns {Policy} */
export function makePolicy(spec, n) {
  const found = [...policyProblems(spec, n)];
  if (found.length) throw new ConfigError(`layer policy ${JSON.stringify(spec.name)}: ${found.join("; ")}`);
  return POLICIES[spec.name].make(n, spec);
}

function* policyProblems(spec, n) {
  const family = Object.hasOwn(POLICIES, spec.name) && POLICIES[spec.name];
  if (!family) return yield `there is none; have: ${Object.keys(POLICIES).join(", ")}`;
  if (!Object.hasOwn(SHAPES, spec.shape)) yield `no depth shape ${spec.shape}; have: ${Object.keys(SHAPES).join(", ")}`;
  if (!Object.hasOwn(SCHEDULES, spec.schedule)) yield `no schedule ${spec.schedule}; have: ${Object.keys(SCHEDULES).join(", ")}`;
  if (!(spec.drop >= 0 && spec.drop < 1)) yield `drop must be at least 0 and below 1, got ${spec.drop}`;
  for (const name of Object.keys(PLAIN_POLICY))
    if (name !== "name" && !family.uses.includes(name) && spec[name] !== PLAIN_POLICY[name]) yield `has no use for ${name}, got ${spec[name]}`;
  for (const name of ["period", "width"])
    if (family.uses.includes(name) && !spec[name] && !["dropbp", "coto"].includes(spec.name)) yield `needs a ${name} of at least 1, got 0`;
  if (spec.schedule !== "constant" !== spec.horizon > 0) yield `schedule ${spec.schedule} does not go with horizon ${spec.horizon}`;
  if (spec.first + spec.width > n) yield `wants layers ${spec.first} to ${spec.first + spec.width - 1}; the model's last is ${n - 1}`;
  const size = spec.width || n;
  if (spec.drop && spec.protected > Math.min(numKept(size, spec.drop), size - 1))
    yield `cannot drop ${spec.drop} of ${size} layers with ${spec.protected} protected`;
}

/** Rows that run through each layer, drawn after the plan; null where a layer runs on a whole batch. @param {PolicySpec} spec */
export function makeGates(spec, n) {
  if (spec.gates !== "row") return null;
  return (step, draws, effects, numRows) => {
    const { stays, rate } = chances(n, spec, step, effects);
    const runs = rate.map((r, layer) => {
      if (stays.includes(layer)) return span(0, numRows);
      return draws.permutation(numRows).slice(0, halfToEven(numRows * (1 - r))).sort((a, b) => a - b);
    });
    if (runs.some((rows) => rows.length)) return runs;
    const [one] = draws.weighted(rate.map((r) => 1 - r), 1);
    return runs.map((_, layer) => (layer === one ? span(0, numRows) : []));
  };
}

/** A fresh source of one step's draws. */
export const drawsOf = (seed, step) => new Draws(seed, "plans", step);
