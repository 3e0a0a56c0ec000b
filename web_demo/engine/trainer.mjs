/** One local run: steps over a data set by a layer policy and an optimizer; it resumes to the bit, as Python's `Trainer`. */
import { copies, floats, isFinite32 } from "./arrays.mjs";
import { fitAdapter } from "./artifact.mjs";
import { measured, split } from "./dataset.mjs";
import { ConfigError, StateError } from "./errors.mjs";
import { evaluate } from "./evaluation.mjs";
import { frozenNames, truncated } from "./lora.mjs";
import { clipScale, Optimizer } from "./optim.mjs";
import { active, trained } from "./plans.mjs";
import { drawsOf, makeGates, makePolicy } from "./policies.mjs";
import { Influence } from "./pulls.mjs";
import { Sha256, hex } from "./sha256.mjs";
import { writeTensors } from "./safetensors.mjs";
import { unsupported } from "./work.mjs";

/** @typedef {{step: number, totalSteps: number, loss: number, activeLayers: number, seconds: number}} StepReport */

export class Trainer {
  /**
   * @param {import("./engine.mjs").Engine} engine
   * @param {import("./dataset.mjs").Dataset} dataset
   * @param {import("./work.mjs").Work} work
   * @param {import("./arrays.mjs").Arrays} adapter not written to
   * @param {{clock?: () => number}} [options] `clock`: seconds
   */
  constructor(engine, dataset, work, adapter, { clock = () => performance.now() / 1000 } = {}) {
    const { manifest } = engine.artifact, missing = unsupported(work), n = manifest.layers.length;
    if (missing.length) throw new ConfigError(`not done by the JavaScript engine: ${missing.join("; ")}`);
    const parts = split(dataset, work.held_out);
    [this.engine, this.work, this.clock, this.dataset] = [engine, work, clock, parts.training];
    // Components beyond the rank are zero for this run, and stay so.
    this.adapter = truncated(fitAdapter(manifest, copies(adapter)), work.rank);
    this.totalSteps = this.dataset.numSteps(work);
    if (!this.totalSteps) throw new ConfigError("nothing to do: steps and epochs are both 0");
    this.held = parts.held && measured(parts.held, this.totalSteps * work.batch_size);
    this.origin = originOf(engine.artifact.digest, dataset.digest, work, adapter);
    this.policy = makePolicy(work.policy, n);
    this.gates = makeGates(work.policy, n);
    this.optimizer = new Optimizer(work.optimizer, this.totalSteps, copies(this.adapter));
    this.frozen = frozenNames(Object.keys(adapter), work);
    this.influence = new Influence(work.optimizer, n, this.dataset.numSamples);
    /** @type {StepReport[]} */
    this.history = [];
    this.figures = {};
    this.epoch = [-1, []];
  }

  get stepIndex() {
    return this.history.length;
  }

  get done() {
    return this.stepIndex >= this.totalSteps;
  }

  /** Samples behind the steps taken, in effect. */
  get effectiveSamples() {
    return this.influence.effective;
  }

  /** Take one step. @returns {Promise<StepReport>} ConfigError if anything is not finite; the run stands before this step */
  async step() {
    const { work, stepIndex } = this, { policy, optimizer } = work;
    if (!stepIndex) await this.#measure("before");
    const start = this.clock(), places = this.#batch(), batch = this.dataset.rows(places);
    const draws = drawsOf(work.seed, stepIndex), at = work.rounds_before * this.totalSteps + stepIndex;
    const plan = this.policy(at, draws, []), gates = this.gates?.(at, draws, [], places.length) ?? null;
    const result = await this.engine.step(batch, plan, this.adapter, { gates, microTokens: work.micro_tokens });
    const learns = trained(plan);
    if (!Object.keys(result.grads).length && !learns.length) throw new ConfigError(`policy ${policy.name} trains the head alone, and this model's is frozen`);
    const grads = truncated(Object.fromEntries(Object.entries(result.grads).filter(([name]) => !this.frozen.has(name))), work.rank);
    this.#update(result.loss, grads);
    const rate = this.optimizer.rate(stepIndex), clip = clipScale(grads, optimizer.clip_norm);
    this.influence.add(places, result.pulls, { trained: learns, rate, clip, gates });
    const layers = gates ? gates.reduce((sum, rows) => sum + rows.length, 0) / places.length : active(plan).length;
    const report = { step: stepIndex, totalSteps: this.totalSteps, loss: result.loss, activeLayers: layers, trainedLayers: learns.length, seconds: this.clock() - start };
    this.history.push(report);
    if (this.done) await this.#measure("after");
    return report;
  }

  /** What a store keeps, so that `restore` goes on from here; owned copies. */
  save() {
    const { origin, optimizer, history, influence, figures } = this;
    const adapter = Object.fromEntries(Object.entries(this.adapter).map(([name, { data }]) => [name, data.slice()]));
    return structuredClone({
      format: 1, origin, adapter, optimizer: optimizer.state, history, figures, influence: { sums: influence.sums, moments: influence.moments },
    });
  }

  /** Go on from a checkpoint of this very run; StateError for any other. */
  restore(found) {
    if (found?.format !== 1 || found.origin !== this.origin) throw new StateError("the checkpoint is of another run");
    if (!Array.isArray(found.history) || found.history.length > this.totalSteps) throw new StateError("the checkpoint is past this run's end");
    const adapter = {};
    for (const [name, { shape, data }] of Object.entries(this.adapter)) {
      const held = found.adapter?.[name];
      if (!(held instanceof Float32Array) || held.length !== data.length) throw new StateError(`the checkpoint is damaged: ${name}`);
      if (!isFinite32((adapter[name] = floats(shape, held.slice())))) throw new StateError(`the checkpoint is damaged: ${name} is not finite`);
    }
    this.adapter = adapter;
    this.optimizer.state = structuredClone(found.optimizer);
    [this.history, this.figures] = [structuredClone(found.history), { ...found.figures }];
    [this.influence.sums, this.influence.moments] = [structuredClone(found.influence.sums), [...found.influence.moments]];
  }

  /** Loss and accuracy of an adapter on the held-out part; null without one. */
  async measure(adapter) {
    return this.held && evaluate(this.engine, this.held, adapter, { batchSize: this.work.batch_size });
  }

  async #measure(when) {
    const start = this.clock(), found = await this.measure(this.adapter);
    if (!found || !Number.isFinite(found.loss) || (when === "after" && !("held_loss_before" in this.figures))) return;
    Object.assign(this.figures, {
      [`held_loss_${when}`]: found.loss, [`held_accuracy_${when}`]: found.accuracy, held_samples: found.numSamples,
      held_seconds: (this.figures.held_seconds ?? 0) + this.clock() - start,
    });
  }

  #batch() {
    const { seed, batch_size } = this.work, count = this.dataset.numBatches(batch_size), epoch = Math.floor(this.stepIndex / count);
    if (this.epoch[0] !== epoch) this.epoch = [epoch, this.dataset.epochBatches(seed, epoch, batch_size)];
    return this.epoch[1][this.stepIndex % count];
  }

  #update(loss, grads) {
    const wrong = Number.isFinite(loss) ? [] : [`the loss is ${loss}`];
    for (const [name, grad] of Object.entries(grads)) if (!isFinite32(grad)) wrong.push(`the gradient of ${name} is not finite`);
    const before = structuredClone(this.optimizer.state);
    const moved = wrong.length ? {} : this.optimizer.update(grads, this.adapter);
    for (const [name, value] of Object.entries(moved)) if (!isFinite32(value)) wrong.push(`${name} is not finite after the update`);
    if (wrong.length) {
      this.optimizer.state = before;
      throw new ConfigError(`step ${this.stepIndex}: ${wrong[0]}; try a lower learning rate than ${this.work.optimizer.lr}, or clip_norm 1`);
    }
    this.adapter = { ...this.adapter, ...moved };
  }
}

/** Digest of what a run is a function of. */
function originOf(artifact, data, work, adapter) {
  const text = new TextEncoder().encode(JSON.stringify([artifact, data, work]));
  return hex(new Sha256().update(text).update(writeTensors(adapter)).digest());
}
