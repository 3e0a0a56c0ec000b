/** An opened artifact that trains, evaluates and answers; what a call returns depends on its arguments alone. */
import { array, sameShape, takeRows, TYPES, zeros } from "./arrays.mjs";
import { Chain } from "./chain.mjs";
import { ArtifactError, ConfigError } from "./errors.mjs";
import { Graphs } from "./graphs.mjs";
import { countedOf, features, isLoraB, labelIndex, learning } from "./manifest.mjs";
import { BARE, DROP, FORWARD, frozen, learnable, route } from "./plans.mjs";
import { joinedPulls } from "./pulls.mjs";
import { shareOf } from "./token_head.mjs";

/**
 * @typedef {Object} StepResult
 * @property {number} loss mean over what counts
 * @property {import("./arrays.mjs").NDArray|null} logits
 * @property {import("./arrays.mjs").Arrays} grads float32 by tensor name, of the trained layers and the head
 * @property {import("./pulls.mjs").Pulls|null} pulls
 */

export class Engine {
  /**
   * @param {import("./artifact.mjs").Artifact} artifact
   * @param {typeof import("onnxruntime-web")} ort
   * @param {{provider?: string, bakes?: boolean, savedLayers?: number|null}} [options] `savedLayers`: of those on the way back, from
   *   the top, that keep their activations; null for all, 0 recomputes every one
   */
  constructor(artifact, ort, { provider, bakes, savedLayers = null } = {}) {
    this.artifact = artifact;
    this.savedLayers = savedLayers;
    this.chain = new Chain(artifact, new Graphs(ort, { provider }), { bakes });
  }

  /** Let go of graphs and weights. */
  close() {
    return this.chain.close();
  }

  /**
   * Forward and backward once; weights are not touched.
   * @param {import("./arrays.mjs").Arrays} batch labels included
   * @param {import("./plans.mjs").Plan} plan
   * @param {import("./arrays.mjs").Arrays} adapter
   * @param {{keepLogits?: boolean, gates?: number[][]|null, microTokens?: number}} [options] `gates`: the rows that run through each layer;
   *   `microTokens`: rows times tokens that run at a time, 0 for no bound
   * @returns {Promise<StepResult>}
   */
  async step(batch, plan, adapter, { keepLogits = false, gates = null, microTokens = 0 } = {}) {
    const { manifest } = this.artifact, rows = this.#checked(batch, manifest.inputs);
    this.#checkPlan(plan);
    plan = learnable(plan, learning(manifest));
    checkBare(plan, manifest);
    const mean = { loss: 0, logits: [], grads: {}, pulls: [], weights: [] }, all = this.#share(batch);
    for (const place of cut(rows, together(rows, tokensOf(batch, manifest.inputs), microTokens))) {
      const part = this.#picked(batch, place, rows), share = this.#share(part);
      const { plan: own, some } = gated(plan, gates, place, rows);
      const found = await this.chain.step(part, route(own, this.savedLayers), adapter, { keepLogits, gates: some });
      add(mean, found, share, all);
    }
    const logits = mean.logits.length ? joinedRows(mean.logits) : null;
    return { loss: mean.loss, logits, grads: mean.grads, pulls: joinedPulls(mean.pulls, mean.weights) };
  }

  /** Mean loss, and likeliest classes in the order of the labels, at full depth. */
  async evaluate(batch, adapter) {
    const { manifest } = this.artifact;
    this.#checked(batch, manifest.inputs);
    const found = await this.chain.evaluate(batch, route(frozen(manifest.layers.length)), adapter);
    return { loss: found.loss, answers: found.answers };
  }

  /** Logits (batch, …, classes), without the layers that `plan` drops; `batch` needs no labels. */
  async predict(batch, adapter, { plan = null } = {}) {
    const { manifest } = this.artifact;
    this.#checked(batch, features(manifest));
    if (plan) this.#checkPlan(plan);
    const still = (plan ?? frozen(manifest.layers.length)).map((mode) => (mode === DROP ? DROP : FORWARD));
    return this.chain.predict(batch, route(still), adapter);
  }

  #checkPlan(plan) {
    const have = this.artifact.manifest.layers.length;
    if (plan.length !== have) throw new ConfigError(`plan of ${plan.length} layers; the model has ${have}`);
  }

  #share(batch) {
    const { manifest } = this.artifact;
    return shareOf(batch[manifest.inputs[labelIndex(manifest)].name], countedOf(manifest));
  }

  /** Rows of a batch, after a look at it; every difference is listed. */
  #checked(batch, inputs) {
    const { bounds } = this.artifact.manifest, symbols = {}, known = new Set(inputs.map((row) => row.name));
    const problems = Object.keys(batch).filter((name) => !known.has(name)).map((name) => `${name}: not an input of this model`);
    for (const row of inputs) {
      const value = batch[row.name];
      if (!value) problems.push(`${row.name}: missing`);
      else if (!fits(row, value, symbols)) problems.push(`${row.name}: expected ${row.dtype}[${row.shape}], got ${value.dtype}[${value.shape}]`);
    }
    for (const [name, extent] of Object.entries(symbols)) if (extent > (bounds[name] ?? extent)) problems.push(`${name} ${extent}: at most ${bounds[name]}`);
    if (problems.length) throw new ArtifactError(`batch does not fit the model: ${problems.join("; ")}`);
    return symbols.batch;
  }

  #picked(batch, place, rows) {
    if (place.length === rows) return batch;
    const inputs = new Map(this.artifact.manifest.inputs.map((row) => [row.name, row]));
    return Object.fromEntries(Object.entries(batch).map(([n, a]) => [n, inputs.get(n).shape[0] === "batch" ? takeRows(a, place) : a]));
  }
}

function fits(row, { dtype, shape, data }, symbols) {
  if (dtype !== row.dtype || !(data instanceof TYPES[dtype]) || shape.length !== row.shape.length) return false;
  return shape.every((extent, i) => extent === (typeof row.shape[i] === "string" ? (symbols[row.shape[i]] ??= extent) : row.shape[i]));
}

function tokensOf(batch, inputs) {
  const widths = inputs.filter((row) => row.shape.includes("seq") && batch[row.name]).map((row) => batch[row.name].shape[row.shape.indexOf("seq")]);
  return Math.max(0, ...widths);
}

/** Rows that run at a time: as few parts as the bound allows, and as equal; as Python's `MemoryPlan.together`. */
function together(size, tokens, microTokens) {
  const most = microTokens ? Math.max(1, Math.min(size, Math.max(1, Math.floor(microTokens / Math.max(1, tokens))))) : size;
  return size ? Math.min(most, Math.ceil(size / Math.ceil(size / most))) : 1;
}

function cut(rows, size) {
  const all = [...Array(rows).keys()], parts = [];
  for (let start = 0; start < rows; start += Math.max(1, size)) parts.push(all.slice(start, start + size));
  return parts.length ? parts : [[]];
}

/** The plan and rows of some rows of a batch: a layer that none of them runs through is dropped. */
function gated(plan, gates, place, rows) {
  if (!gates) return { plan, some: null };
  const inside = gates.map((through) => place.flatMap((row, i) => (through.includes(row) ? [i] : [])));
  return {
    plan: plan.map((mode, layer) => (inside[layer].length ? mode : DROP)),
    some: inside.map((own) => (own.length === place.length ? null : own)), rows,
  };
}

function add(mean, found, share, all) {
  const weight = share / Math.max(1, all), scale = Math.fround(weight);
  mean.loss += share ? weight * found.loss : 0;
  if (found.logits) mean.logits.push(found.logits);
  mean.pulls.push(found.pulls);
  mean.weights.push(weight);
  for (const [name, grad] of Object.entries(found.grads)) {
    const scaled = weight === 1 ? grad.data : Float32Array.from(grad.data, (g) => (weight ? g * scale : 0));
    const held = mean.grads[name];
    mean.grads[name] = array("float32", grad.shape, held ? Float32Array.from(held.data, (h, i) => h + scaled[i]) : scaled);
  }
}

function joinedRows(parts) {
  if (parts.length === 1) return parts[0];
  const rest = parts[0].shape.slice(1), whole = zeros(parts[0].dtype, [parts.reduce((n, p) => n + p.shape[0], 0), ...rest]);
  if (!parts.every((p) => sameShape(p.shape.slice(1), rest))) throw new ArtifactError("logits of parts differ in shape");
  let place = 0;
  for (const { data } of parts) {
    whole.data.set(data, place);
    place += data.length;
  }
  return whole;
}

function checkBare(plan, manifest) {
  plan.forEach((mode, i) => {
    if (mode === BARE && !manifest.layers[i].tensors.some((t) => isLoraB(manifest.tensors[t].name)))
      throw new ConfigError(`layer ${i} has no LoRA to switch off; drop or freeze it`);
  });
}
