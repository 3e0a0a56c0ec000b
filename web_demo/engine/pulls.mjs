/** How hard each row of a batch pulls at what learns, and how many samples are behind a run in effect; as Python's `influence`. */

/** @typedef {{body: number[], head: number[]}} Pulls norms by row */

/**
 * @param {import("./arrays.mjs").NDArray|null} logits (B, C), of a head that answers once for a row
 * @param {import("./arrays.mjs").NDArray} labels
 * @param {import("./arrays.mjs").NDArray|null} dHidden gradient of the mean loss at the hidden stream, (B, …)
 * @returns {Pulls|null}
 */
export function pullsOf(logits, labels, dHidden) {
  const found = dHidden ? [norms(dHidden)] : [];
  if (logits?.shape.length === 2 && labels.shape.length === 1) found.push(atLogits(logits, labels));
  return found.length ? { body: found[0], head: found.at(-1) } : null;
}

/** Rows of parts behind each other, each part times its weight; null if one was not measured. */
export function joinedPulls(parts, weights) {
  if (!parts.length || parts.some((part) => !part)) return null;
  const side = (name) => parts.flatMap((part, i) => part[name].map((pull) => pull * weights[i]));
  return { body: side("body"), head: side("head") };
}

function norms({ shape, data }) {
  const width = data.length / shape[0];
  return Array.from({ length: shape[0] }, (_, row) => {
    let squares = 0;
    for (let i = row * width; i < (row + 1) * width; i++) squares += data[i] * data[i];
    return Math.sqrt(squares);
  });
}

function atLogits({ shape: [rows, classes], data }, labels) {
  return Array.from({ length: rows }, (_, row) => {
    const z = Array.from(data.subarray(row * classes, (row + 1) * classes)), top = Math.max(...z);
    const powers = z.map((x) => Math.exp(x - top)), sum = powers.reduce((a, b) => a + b, 0);
    const squares = powers.reduce((all, p, c) => all + (p / sum - (c === Number(labels.data[row]) ? 1 : 0)) ** 2, 0);
    return Math.sqrt(squares) / rows;
  });
}

const SQUARES_KEPT = 0.999;

/** Sums over a run's steps by layer and sample; the last row is the head's. */
export class Influence {
  constructor(spec, numLayers, numSamples) {
    this.spec = spec;
    this.sums = Array.from({ length: numLayers + 1 }, () => new Float64Array(numSamples));
    this.moments = [0, 0, 0];
  }

  /** Take in a step; arguments as Python's. */
  add(samples, pulls, { trained, rate, clip = 1, gates = null }) {
    const even = samples.map(() => 1 / Math.max(1, samples.length));
    const { body, head } = this.#scaled(pulls ?? { body: even, head: even }, clip);
    const kept = Math.abs(1 - rate * (this.spec.weight_decay + this.spec.proximal)), last = this.sums.length - 1;
    for (const layer of [...trained, last]) this.sums[layer].forEach((s, i, row) => (row[i] = s * kept));
    for (const layer of trained)
      samples.forEach((sample, i) => (this.sums[layer][sample] += gates && !gates[layer].includes(i) ? 0 : rate * body[i]));
    samples.forEach((sample, i) => (this.sums[last][sample] += rate * head[i]));
  }

  /** Samples behind the layer, or head, that has the fewest. */
  get effective() {
    const rows = this.sums.filter((row) => row.some((s) => s !== 0));
    if (this.sums.some((row) => row.some((s) => !Number.isFinite(s))) || !rows.length) return 0;
    return Math.min(...rows.map(effectiveOf));
  }

  #scaled(pulls, clip) {
    const sides = [pulls.body, pulls.head].map((side) => side.map((pull) => clip * pull));
    if (this.spec.name !== "adamw") return { body: sides[0], head: sides[1] };
    const squares = [...sides.map((side) => side.reduce((sum, pull) => sum + pull * pull, 0)), 1];
    this.moments = this.moments.map((moment, i) => SQUARES_KEPT * moment + (1 - SQUARES_KEPT) * squares[i]);
    const over = sides.map((_, i) => Math.sqrt(this.moments[i] / this.moments[2]));
    const [body, head] = sides.map((side, i) => (over[i] > 0 ? side.map((pull) => pull / over[i]) : side));
    return { body, head };
  }
}

function effectiveOf(sums) {
  const top = Math.max(...sums), shares = [...sums].map((s) => s / top), total = shares.reduce((a, b) => a + b, 0);
  return Math.min(total ** 2 / shares.reduce((all, s) => all + s * s, 0), 2 * total);
}
