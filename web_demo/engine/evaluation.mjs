/** How good an adapter is on labelled samples, at full depth. */
import { countedOf } from "./manifest.mjs";
import { shareOf, shifted } from "./token_head.mjs";

/**
 * @param {import("./engine.mjs").Engine} engine
 * @param {import("./dataset.mjs").Dataset} dataset
 * @param {import("./arrays.mjs").Arrays} adapter
 * @param {{batchSize?: number, onBatch?: (done: number, all: number) => unknown}} [options]
 * @returns {Promise<{loss: number, accuracy: number, numSamples: number}>}
 */
export async function evaluate(engine, dataset, adapter, { batchSize = 32, onBatch = () => {} } = {}) {
  const counted = countedOf(engine.artifact.manifest);
  let loss = 0, shares = 0, right = 0, judged = 0, done = 0;
  for (const places of dataset.orderedBatches(batchSize)) {
    const batch = dataset.rows(places), labels = batch[dataset.labelName];
    const found = await engine.evaluate(batch, adapter), share = shareOf(labels, counted);
    const wanted = counted ? shifted(labels, counted) : labels.data, ignored = counted ? BigInt(counted.ignored) : null;
    wanted.forEach((label, i) => {
      if (label === ignored) return;
      judged++;
      right += Number(label) === found.answers[i];
    });
    [loss, shares, done] = [loss + found.loss * share, shares + share, done + places.length];
    await onBatch(done, dataset.numSamples);
  }
  return { loss: loss / Math.max(1, shares), accuracy: right / Math.max(1, judged), numSamples: dataset.numSamples };
}
