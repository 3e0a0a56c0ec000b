/** A head that works token by token, a few rows at a time, as Python's `engine/token_head`. */
import { array, floats, zeros } from "./arrays.mjs";

const LOGITS_BYTES = 16 * 2 ** 20;

/** Labels (batch, seq) or (batch,) moved to the left; int64 as BigInt. @returns {BigInt64Array} */
export function shifted(labels, { shift, ignored }) {
  const width = labels.shape.at(-1) ?? 0, moved = new BigInt64Array(labels.data.length).fill(BigInt(ignored));
  for (let i = 0; i < moved.length; i++) if ((i % width) + shift < width) moved[i] = BigInt(labels.data[i + shift]);
  return moved;
}

/** How many a mean loss is taken over. @param {import("./manifest.mjs").Targets|null} counted */
export function shareOf(labels, counted) {
  if (!counted) return labels.shape[0];
  const ignored = BigInt(counted.ignored);
  return shifted(labels, counted).reduce((count, label) => count + (label !== ignored), 0);
}

/** Place of the largest of `width` numbers from `start`, of equal ones the first. */
export function argmax(data, start, width) {
  let best = 0;
  for (let i = 1; i < width; i++) if (data[start + i] > data[start + best]) best = i;
  return best;
}

/**
 * Run the head over all tokens that have a target.
 * @param {(hidden: import("./arrays.mjs").NDArray, targets: import("./arrays.mjs").NDArray) => Promise<{loss: number, logits, d_hidden, grads}>} run
 *   hidden (1, rows, width) and targets (1, rows) to the sum of losses and what comes with it
 */
export async function runTokens(run, hidden, labels, { targets, numClasses, keepLogits = false, backward = true }) {
  const wanted = shifted(labels, targets), ignored = BigInt(targets.ignored), width = hidden.shape.at(-1);
  const counted = [...wanted.keys()].filter((i) => wanted[i] !== ignored);
  const scale = Math.fround(1 / Math.max(1, counted.length));
  const rows = keepLogits || !counted.length ? [...wanted.keys()] : counted;
  const answers = new Int32Array(wanted.length), grads = {};
  const logits = keepLogits ? zeros("float32", [...labels.shape, numClasses]) : null;
  const gradient = backward ? zeros("float32", hidden.shape) : null;
  let loss = 0;
  const size = Math.max(1, Math.floor(LOGITS_BYTES / (4 * numClasses)));
  for (let start = 0; start < rows.length; start += size) {
    const chunk = rows.slice(start, start + size), some = new Float32Array(chunk.length * width);
    chunk.forEach((row, i) => some.set(hidden.data.subarray(row * width, (row + 1) * width), i * width));
    const aims = array("int64", [1, chunk.length], BigInt64Array.from(chunk, (row) => wanted[row]));
    const found = await run(floats([1, chunk.length, width], some), aims);
    loss += found.loss;
    chunk.forEach((row, i) => {
      answers[row] = argmax(found.logits.data, i * numClasses, numClasses);
      if (logits) logits.data.set(found.logits.data.subarray(i * numClasses, (i + 1) * numClasses), row * numClasses);
      if (gradient) for (let j = 0; j < width; j++) gradient.data[row * width + j] = Math.fround(found.d_hidden.data[i * width + j] * scale);
    });
    for (const [name, gained] of Object.entries(found.grads)) {
      grads[name] ??= zeros("float32", gained.shape);
      gained.data.forEach((g, i) => (grads[name].data[i] = Math.fround(grads[name].data[i] + Math.fround(g * scale))));
    }
  }
  return { loss: loss * scale, answers, logits, d_hidden: gradient, grads };
}
