/** The work of one offer, a step at a time, and what of it may leave; as Python's `agent/local_run`. */
import { bytesOf, copies, sameShape } from "../engine/arrays.mjs";
import { ConfigError } from "../engine/errors.mjs";
import { evaluate } from "../engine/evaluation.mjs";
import { trainedPart } from "../engine/lora.mjs";
import { Trainer } from "../engine/trainer.mjs";
import { makeCodec, packUpdate } from "../wire/codecs/codecs.mjs";
import { placed, weightOf, writeNumbers } from "../wire/sums/grid.mjs";
import { asKind, chainOf, ofKind, RESIDUAL } from "../wire/codecs/memory.mjs";
import { spared } from "./lazy_upload.mjs";
import { checkEffective, clipped, MASKED, numUsed } from "./terms.mjs";

const LOSSES_TOLD = 20;
/** Codecs of updates of which the sum alone is meant; under masks nobody can read more. */
export const SUMMED = [MASKED, "grid"];

export class LocalRun {
  /**
   * @param {object} offer
   * @param {import("../engine/arrays.mjs").Arrays} reference the adapter that it names
   * @param {{home: import("./home.mjs").Home, bench: import("./bench.mjs").Bench, memory: import("./memory.mjs").CodecMemory,
   *   masking: import("./masking.mjs").Masking, key: string, fetchS?: number}} parts
   */
  constructor(offer, reference, { home, bench, memory, masking, key, fetchS = 0 }) {
    Object.assign(this, { offer, reference, home, bench, memory, masking, key, fetchS });
    /** @type {Trainer|null} */
    this.training = null;
  }

  /** Whether all steps are done, and the masks of what came of them are not there yet. */
  get isWaiting() {
    return Boolean(this.training?.done) && this.offer.work.codec === MASKED && !this.masking.isReady(this.key);
  }

  /** One step, or a whole evaluation; what came of the run when it is done, else null. */
  step() {
    return this.offer.role === "evaluate" ? this.#evaluate() : this.#train();
  }

  /** Keep what is trained so far. */
  async checkpoint() {
    if (this.training?.stepIndex) await this.home.store.set({ [this.home.key("checkpoint")]: { key: this.key, saved: this.training.save() } });
  }

  async #train() {
    this.training ??= await this.#started();
    const { training, home, offer } = this;
    if (!training.done) {
      const { loss, seconds, activeLayers } = await training.step();
      home.onEvent({ kind: "step", round: offer.round, step: training.stepIndex, steps: training.totalSteps, loss, seconds, activeLayers });
    }
    if (training.done) {
      checkEffective(home.terms, training.effectiveSamples);
      if (!this.isWaiting) return SUMMED.includes(offer.work.codec) ? this.#packSum(training) : this.#pack(training);
      await this.checkpoint();
      return null;
    }
    if (training.stepIndex % home.checkpointEvery === 0) await this.checkpoint();
    return null;
  }

  async #started() {
    const { work } = this.offer, rows = this.bench.dataset(work.seq_len), used = numUsed(work, rows.numSamples, this.home.terms.least_batch);
    const dataset = used < rows.numSamples ? rows.subset([...Array(used).keys()]) : rows;
    const fresh = () => new Trainer(this.bench.engine, dataset, work, this.reference), training = fresh();
    const kept = await this.home.store.get(this.home.key("checkpoint"));
    if (kept?.key !== this.key) return training;
    try {
      training.restore(kept.saved);
      this.home.onEvent({ kind: "restored", round: this.offer.round, step: training.stepIndex });
      return training;
    } catch (error) {
      // Whatever is wrong with it: damaged once, it would be tried for ever.
      await this.home.store.set({ [this.home.key("checkpoint")]: undefined });
      this.home.onEvent({ kind: "dropped", round: this.offer.round, text: `starting afresh: ${error.message}` });
      return fresh();
    }
  }

  async #pack(training) {
    const { offer, home } = this, { work } = offer, reference = trainedPart(this.reference, work);
    const outgoing = clipped(trainedPart(training.adapter, work), reference, home.terms.most_change);
    const codec = makeCodec(work.codec, work.codec_ratio, work.codec_bits), { memory, left: unfit } = fitting(shared(await this.memory.before(offer.round), codec, offer), reference);
    const referenceSha256 = offer.is_exact ? "" : offer.adapter_sha256 || offer.adapter.sha256;
    const whole = packUpdate(codec, changed(outgoing.values, reference, ofKind(RESIDUAL, memory)), reference, { memory, referenceSha256 });
    const packed = spared(whole, codec, reference, { memory, bound: offer.lazy, referenceSha256 }) ?? whole;
    const stats = home.terms.tell_figures ? { ...statsOf(training), change_norm: outgoing.norm, clip_scale: outgoing.scale, ...(this.fetchS ? { fetch_seconds: this.fetchS } : {}) } : {};
    const left = this.#left("update", training, outgoing);
    return { header: this.#header(stats), payload: packed.payload, memory: { ...unfit, ...packed.memory }, left, event: { kind: "trained", round: offer.round, loss: stats.loss, bytes: packed.payload.length } };
  }

  /** Put the update on the offer's grid, and mask it if it is to be: the aggregator is told no figure of it alone. */
  async #packSum(training) {
    const { offer, home } = this, { work, grid } = offer, reference = trainedPart(this.reference, work);
    const outgoing = clipped(trainedPart(training.adapter, work), reference, home.terms.most_change);
    const { numbers, numCut } = placed(outgoing.values, reference, grid, { weight: weightOf(grid, this.bench.numSamples), seed: work.seed });
    if (work.codec === MASKED) await this.masking.mask(numbers, grid);
    const payload = writeNumbers(numbers, grid), seconds = training.history.reduce((sum, step) => sum + step.seconds, 0);
    const left = this.#left(work.codec === MASKED ? "masked update" : "update", training, outgoing);
    return { header: this.#header(home.terms.tell_figures ? { seconds } : {}), payload, memory: null, left, event: { kind: "trained", round: offer.round, bytes: payload.length, cut: numCut } };
  }

  #header(stats) {
    const { offer, home } = this;
    return {
      type: "update", device_id: home.deviceId, job: offer.job, task_id: offer.task_id, round: offer.round, version: offer.version, codec: offer.work.codec,
      num_samples: this.bench.numSamples, stats: finiteOf(stats), histogram: [],
    };
  }

  #left = (kind, training, { norm, scale }) =>
    ({ kind, steps: training.stepIndex, samples: training.dataset.numSamples, effective: training.effectiveSamples, norm, scale, codec: this.offer.work.codec });

  async #evaluate() {
    const { offer, home, bench } = this, dataset = bench.dataset(offer.work.seq_len);
    const { loss, accuracy, numSamples } = await evaluate(bench.engine, dataset, this.reference, { batchSize: offer.work.batch_size, onBatch: bench.pause });
    if (!Number.isFinite(loss)) throw new ConfigError(`the loss is ${loss}: an adapter that ran away`);
    const header = { type: "report", device_id: home.deviceId, job: offer.job, task_id: offer.task_id, round: offer.round, version: offer.version, loss, accuracy, num_samples: numSamples };
    return { header, payload: null, memory: null, left: { kind: "report", samples: numSamples }, event: { kind: "evaluated", round: offer.round, loss, accuracy } };
  }
}

/** A codec's memory, without what the aggregator should remember too where it does not remember the same. */
function shared(memory, codec, offer) {
  if (!codec.remembers || chainOf(memory) === offer.memory) return memory;
  return Object.fromEntries(Object.entries(memory).filter(([key]) => !codec.remembers.includes(key.split("/", 1)[0])));
}

/** What fits the tensors that travel now, and what is owed of others or of another rank. */
function fitting(memory, reference) {
  const owed = Object.entries(ofKind(RESIDUAL, memory)), unfit = owed.filter(([name, { shape }]) => !reference[name] || !sameShape(shape, reference[name].shape));
  const left = asKind(RESIDUAL, Object.fromEntries(unfit));
  return { memory: Object.fromEntries(Object.entries(memory).filter(([key]) => !left[key])), left };
}

/** Only what training touched travels; all, if nothing was. */
function changed(values, reference, owed) {
  const isTouched = ([name, value]) => owed[name] || !same(bytesOf(value), bytesOf(reference[name]));
  const touched = Object.entries(values).filter(isTouched);
  return touched.length ? Object.fromEntries(touched) : copies(values);
}

const same = (a, b) => a.length === b.length && a.every((byte, i) => byte === b[i]);

function statsOf({ history, figures }) {
  const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length, losses = history.map((step) => step.loss);
  return {
    loss: mean(losses.slice(-LOSSES_TOLD)), loss_first: mean(losses.slice(0, LOSSES_TOLD)), active_layers: mean(history.map((step) => step.activeLayers)),
    trained_layers: mean(history.map((step) => step.trainedLayers)), seconds: history.reduce((sum, step) => sum + step.seconds, 0), ...figures,
  };
}

const finiteOf = (stats) => Object.fromEntries(Object.entries(stats).filter(([, value]) => Number.isFinite(value)));
