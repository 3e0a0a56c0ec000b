/** A layer plan says what each layer does in one step; its route, which layers run there, and which back. */

export const DROP = 0, FORWARD = 1, TRAIN = 2, BYPASS = 3, BARE = 4;

/** @typedef {number[]} Plan one mode per layer */

export const span = (first, size) => Array.from({ length: size }, (_, i) => first + i);
export const full = (n) => Array(n).fill(TRAIN);
export const frozen = (n) => Array(n).fill(FORWARD);
export const dropping = (n, dropped) => span(0, n).map((i) => (dropped.includes(i) ? DROP : TRAIN));
export const active = (plan) => span(0, plan.length).filter((i) => plan[i] !== DROP);
export const trained = (plan) => span(0, plan.length).filter((i) => plan[i] === TRAIN);

/** The plan with those layers frozen that have nothing to train, or to run without. */
export const learnable = (plan, learning) =>
  plan.map((mode, i) => ((mode === TRAIN || mode === BARE) && !learning.has(i) ? FORWARD : mode));

/**
 * @typedef {Object} Route all lowest first
 * @property {number[]} layers those that run
 * @property {number} lowest the lowest trained one, or the number of layers
 * @property {Set<number>} trained those whose adapters get gradients
 * @property {Set<number>} saved those that keep their activations for the way back
 * @property {Set<number>} around those that the gradient goes around
 * @property {Set<number>} bare those that run without their LoRA
 *
 * @param {Plan} plan
 * @param {number|null} savedLayers how many of those on the way back, from the top, save their activations; null for all
 * @returns {Route}
 */
export function route(plan, savedLayers = null) {
  const layers = active(plan), learns = trained(plan), lowest = learns[0] ?? plan.length;
  const around = new Set(layers.filter((i) => plan[i] === BYPASS));
  const back = layers.filter((i) => i >= lowest && !around.has(i));
  const count = savedLayers === null ? back.length : Math.min(savedLayers, back.length);
  return {
    layers, lowest, around, trained: new Set(learns), saved: new Set(back.slice(back.length - count)),
    bare: new Set(layers.filter((i) => plan[i] === BARE)),
  };
}
