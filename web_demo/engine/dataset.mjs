/** Samples as a device holds them, cut into padded batches by (seed, epoch) and nothing else. */
import { array, TYPES } from "./arrays.mjs";
import { batches, byLength, cut, permutation } from "./draws.mjs";
import { ConfigError } from "./errors.mjs";
import { Sha256, hex } from "./sha256.mjs";

const WIDTH_MULTIPLE = 8, HELD_MAX = 64, ROWS_FREE = 16, ROWS_TRAINED_EACH = 16;

/**
 * @typedef {{rows: ArrayLike<number>[], pad: number, dtype: string}} Ragged
 * @typedef {{values: number[]}} Dense one number a row, int64
 */

export class Dataset {
  /**
   * @param {Record<string, Ragged|Dense>} columns by input name
   * @param {number[]} lengths
   * @param {{seqLen: number, widthMax?: number, labelName?: string, cut?: number}} facts `cut`: rows that lost tokens
   */
  constructor(columns, lengths, { seqLen, widthMax = seqLen, labelName = "", cut: numCut = 0 }) {
    [this.columns, this.lengths, this.seqLen, this.widthMax, this.labelName, this.numCut] = [columns, lengths, seqLen, widthMax, labelName, numCut];
    this.digest = digestOf(columns, lengths, seqLen);
  }

  get numSamples() {
    return this.lengths.length;
  }

  /** One class a row, or none. @returns {number[]} */
  get labels() {
    return this.columns[this.labelName]?.values ?? [];
  }

  numBatches(size) {
    if (!(size >= 1)) throw new ConfigError(`batch size must be at least 1, got ${size}`);
    return Math.ceil(this.numSamples / size);
  }

  /** Steps of a run. @param {import("./work.mjs").Work} work */
  numSteps = (work) => work.steps || work.epochs * this.numBatches(work.batch_size);

  epochBatches = (seed, epoch, size) => batches(seed, epoch, size, this.lengths);

  /** Each row once, shortest first. */
  orderedBatches = (size) => cut(byLength([...this.lengths.keys()], this.lengths), size);

  /** A batch by input name, padded to its longest row in steps of 8. @returns {import("./arrays.mjs").Arrays} */
  rows(places) {
    const longest = Math.max(...places.map((i) => this.lengths[i]));
    const width = Math.min(Math.ceil(longest / WIDTH_MULTIPLE) * WIDTH_MULTIPLE, this.widthMax);
    return Object.fromEntries(Object.entries(this.columns).map(([name, column]) => [name, column.values ? dense(column, places) : ragged(column, places, width)]));
  }

  /** The rows at `places` as a data set of their own. */
  subset(places) {
    const columns = Object.fromEntries(Object.entries(this.columns).map(([name, column]) => [name,
      column.values ? { values: places.map((i) => column.values[i]) } : { ...column, rows: places.map((i) => column.rows[i]) }]));
    return new Dataset(columns, places.map((i) => this.lengths[i]), { seqLen: this.seqLen, labelName: this.labelName });
  }
}

function dense({ values }, places) {
  return array("int64", [places.length], BigInt64Array.from(places, (i) => BigInt(values[i])));
}

function ragged({ rows, pad, dtype }, places, width) {
  const Type = TYPES[dtype], isBig = Type === BigInt64Array, data = new Type(places.length * width).fill(isBig ? BigInt(pad) : pad);
  places.forEach((place, i) => Array.prototype.forEach.call(rows[place], (value, j) => (data[i * width + j] = isBig ? BigInt(value) : value)));
  return array(dtype, [places.length, width], data);
}

function digestOf(columns, lengths, seqLen) {
  const digest = new Sha256(), text = new TextEncoder();
  for (const name of Object.keys(columns).sort()) {
    const column = columns[name];
    digest.update(text.encode(`${name} ${seqLen} ${column.values ? "dense" : column.dtype}`));
    digest.update(new Uint8Array(Float64Array.from(column.values ?? column.rows.flatMap((row) => [...row])).buffer));
  }
  return hex(digest.update(new Uint8Array(Float64Array.from(lengths).buffer)).digest());
}

/**
 * Hold back a share of the rows for measuring.
 * @returns {{training: Dataset, held: Dataset|null, kept: number[]}} `kept`: places of the training rows in the whole
 */
export function split(dataset, share) {
  const n = dataset.numSamples, all = [...Array(n).keys()];
  const isOfOneClass = dataset.labels.length > 0 && new Set(dataset.labels).size < 2;
  if (!share || n < 2 || isOfOneClass) return { training: dataset, held: null, kept: all };
  const count = Math.min(Math.max(1, Math.round(share * n)), Math.floor(n / 2), HELD_MAX);
  const held = permutation([parseInt(dataset.digest.slice(0, 13), 16), "held-out", 0, 0], n).slice(0, count).sort((a, b) => a - b);
  const kept = all.filter((i) => !held.includes(i));
  return { training: dataset.subset(kept), held: dataset.subset(held), kept };
}

/** The held-out rows that a run measures: the first few. */
export function measured(held, numTrained) {
  const count = Math.max(ROWS_FREE, Math.floor(numTrained / ROWS_TRAINED_EACH));
  return count >= held.numSamples ? held : held.subset([...Array(count).keys()]);
}
