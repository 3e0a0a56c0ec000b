/**
 * Optimizers in float32, each element rounded where numpy rounds it, so that losses are Python's. State is plain arrays that a
 * store can hold. A tensor without a gradient keeps its value, its moments and its step count.
 */
import { floats } from "./arrays.mjs";
import { ConfigError } from "./errors.mjs";

const { fround, sqrt } = Math;

/** @typedef {{name: string, lr: number, weight_decay: number, warmup_steps: number, decay: string, clip_norm: number, proximal: number}} OptimizerSpec */
/** @typedef {{step: number, steps: Record<string, number>, m: Record<string, Float32Array>, v: Record<string, Float32Array>}} OptimizerState */

const DECAYS = {
  constant: () => 1,
  linear: (progress) => 1 - progress,
  cosine: (progress) => 0.5 * (1 + Math.cos(Math.PI * progress)),
};
const RULES = { adamw, sgd };
export const OPTIMIZERS = Object.keys(RULES);

export const PLAIN_OPTIMIZER = { name: "adamw", lr: 2e-3, weight_decay: 0, warmup_steps: 0, decay: "constant", clip_norm: 0, proximal: 0 };

/** The learning rate as a function of the step, from 0. @param {OptimizerSpec} spec */
export function scheduledRate(spec, totalSteps) {
  const decay = DECAYS[spec.decay];
  return (step) => {
    const warm = spec.warmup_steps ? Math.min(1, (step + 1) / spec.warmup_steps) : 1;
    const progress = Math.min(1, Math.max(0, step - spec.warmup_steps) / Math.max(1, totalSteps - spec.warmup_steps));
    return spec.lr * warm * decay(progress);
  };
}

/** What clipping multiplies gradients by. @param {import("./arrays.mjs").Arrays} grads */
export function clipScale(grads, most) {
  if (!most) return 1;
  let squares = 0;
  for (const { data } of Object.values(grads)) squares += fround(sqrt(data.reduce((sum, g) => sum + g * g, 0))) ** 2;
  return Math.min(1, most / (sqrt(squares) + 1e-6));
}

export class Optimizer {
  /** @param {OptimizerSpec} spec @param {number} totalSteps @param {import("./arrays.mjs").Arrays} anchor what a proximal term pulls to */
  constructor(spec, totalSteps, anchor) {
    if (!Object.hasOwn(RULES, spec.name)) throw new ConfigError(`no optimizer ${JSON.stringify(spec.name)}; have: ${OPTIMIZERS.join(", ")}`);
    if (!Object.hasOwn(DECAYS, spec.decay)) throw new ConfigError(`no decay ${JSON.stringify(spec.decay)}; have: ${Object.keys(DECAYS).join(", ")}`);
    if (!(spec.lr > 0)) throw new ConfigError(`lr must be above 0, got ${spec.lr}`);
    [this.spec, this.rate, this.anchor] = [spec, scheduledRate(spec, totalSteps), anchor];
    /** @type {OptimizerState} */
    this.state = { step: 0, steps: {}, m: {}, v: {} };
  }

  /** New values of the tensors that have gradients. @returns {import("./arrays.mjs").Arrays} */
  update(grads, params) {
    const { spec, state } = this, pull = fround(spec.proximal), steep = {}, moved = {};
    for (const [name, { shape, data }] of Object.entries(grads)) {
      const w = params[name].data, w0 = this.anchor[name].data;
      steep[name] = floats(shape, spec.proximal ? data.map((g, i) => g + fround(pull * fround(w[i] - w0[i]))) : data);
    }
    const clip = fround(clipScale(steep, spec.clip_norm)), factor = fround(-this.rate(state.step));
    for (const [name, { shape, data }] of Object.entries(steep)) {
      const clipped = spec.clip_norm ? data.map((g) => g * clip) : data, w = params[name].data;
      const change = RULES[spec.name](spec, state, name, clipped, w);
      moved[name] = floats(shape, change.map((x, i) => w[i] + fround(x * factor)));
    }
    state.step += 1;
    return moved;
  }
}

/** Adam, then decoupled decay: Loshchilov and Hutter, arXiv 1711.05101. */
function adamw(spec, state, name, grad, w) {
  const t = (state.steps[name] ?? 0) + 1, n = grad.length, x = new Float32Array(n);
  const m = (state.m[name] ??= new Float32Array(n)), v = (state.v[name] ??= new Float32Array(n));
  const keep1 = fround(0.9), keep2 = fround(0.999), take1 = fround(1 - 0.9), take2 = fround(1 - 0.999);
  const scale = sqrt(1 - 0.999 ** t), eps = fround(1e-8 * scale), last = fround(scale / (1 - 0.9 ** t)), decay = fround(spec.weight_decay);
  for (let i = 0; i < n; i++) {
    m[i] = fround(m[i] * keep1) + fround(grad[i] * take1);
    v[i] = fround(v[i] * keep2) + fround(fround(grad[i] * grad[i]) * take2);
    const change = fround(fround(m[i] / fround(fround(sqrt(v[i])) + eps)) * last);
    x[i] = spec.weight_decay ? fround(w[i] * decay) + change : change;
  }
  state.steps[name] = t;
  return x;
}

/** As `torch.optim.SGD`: weight decay is part of the gradient. */
function sgd(spec, _state, _name, grad, w) {
  const decay = fround(spec.weight_decay);
  return spec.weight_decay ? grad.map((g, i) => fround(w[i] * decay) + g) : grad;
}
