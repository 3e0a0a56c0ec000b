/** Every draw of docs/draws.md: Philox4x32-10 by counter, then integers, + - * / and comparisons. tests/data/draws.json holds it. */
import { ConfigError } from "./errors.mjs";

/** One number per purpose. */
export const STREAMS = {
  plans: 1, batches: 2, selection: 3, devices: 4, personal: 5, effects: 9, configurator: 10, "held-out": 11, rounding: 16,
  rows: 20, sketch: 21, "eval-split": 24, jitter: 30,
};

/** @typedef {[seed: number, stream: keyof typeof STREAMS, number: number, part: number]} Key */

/**
 * Words of one block.
 * @param {number[]} counter four words
 * @param {number[]} key two words
 */
export function philox([c0, c1, c2, c3], [k0, k1]) {
  for (let round = 0; round < 10; round++) {
    const lo0 = Math.imul(0xd2511f53, c0), hi0 = high(0xd2511f53, c0);
    const lo1 = Math.imul(0xcd9e8d57, c2), hi1 = high(0xcd9e8d57, c2);
    [c0, c1, c2, c3] = [hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0];
    k0 = (k0 + 0x9e3779b9) | 0;
    k1 = (k1 + 0xbb67ae85) | 0;
  }
  return [c0 >>> 0, c1 >>> 0, c2 >>> 0, c3 >>> 0];
}

/** Upper half of the product of two words. */
function high(a, b) {
  const al = a & 0xffff, ah = a >>> 16, bl = b & 0xffff, bh = b >>> 16;
  const mid = ah * bl + ((al * bl) >>> 16), low = al * bh + (mid & 0xffff);
  return (ah * bh + (mid >>> 16) + (low >>> 16)) | 0;
}

/** @param {Key} key @returns {Uint32Array} */
export function words([seed, stream, number, part = 0], count) {
  if (!Number.isSafeInteger(seed) || seed < 0) throw new ConfigError(`seed ${seed}: from 0 to 2**53 - 1`);
  const halves = [seed % 2 ** 32, Math.floor(seed / 2 ** 32)], drawn = new Uint32Array(Math.ceil(count / 4) * 4);
  for (let i = 0; 4 * i < count; i++) drawn.set(philox([i, number, part, STREAMS[stream]], halves), 4 * i);
  return drawn.subarray(0, count);
}

/** Integers of 53 bits. @param {Key} key @returns {number[]} */
export function integers(key, count) {
  const w = words(key, 2 * count);
  return Array.from({ length: count }, (_, i) => (w[2 * i] >>> 5) * 2 ** 26 + (w[2 * i + 1] >>> 6));
}

/** Numbers in [0, 1). @param {Key} key */
export const uniforms = (key, count) => integers(key, count).map((n) => n / 2 ** 53);

/** 0 … count - 1 in the order of one integer each, equal ones by place. @param {Key} key */
export function permutation(key, count) {
  const drawn = integers(key, count);
  return [...drawn.keys()].sort((a, b) => drawn[a] - drawn[b] || a - b);
}

/** Places without replacement, each next one by its share of the weights that are left. @param {Key} key */
export function weighted(key, weights, count) {
  const left = [...weights];
  return uniforms(key, count).map((u) => {
    const total = left.reduce((sum, w) => sum + w, 0);
    let place = 0, sum = left[0];
    while (!(sum > u * total)) sum += left[++place];
    left[place] = 0;
    return place;
  });
}

/** Draws of one step: each call takes the next part of the key. */
export class Draws {
  constructor(seed, stream, number) {
    this.next = [seed, stream, number, 0];
  }

  #take() {
    const key = [...this.next];
    this.next[3]++;
    return key;
  }

  uniforms = (count) => uniforms(this.#take(), count);
  permutation = (count) => permutation(this.#take(), count);
  weighted = (weights, count) => weighted(this.#take(), weights, count);
}

/** Rows cut into parts of `size`. */
export function cut(rows, size) {
  const parts = [];
  for (let start = 0; start < rows.length; start += size) parts.push(rows.slice(start, start + size));
  return parts;
}

/** Batches of an epoch: like lengths together, in random order. @param {ArrayLike<number>} lengths @returns {number[][]} */
export function batches(seed, epoch, size, lengths) {
  const order = permutation([seed, "batches", epoch, 0], lengths.length);
  const parts = cut(order, 32 * size).flatMap((rows) => cut(byLength(rows, lengths), size));
  return permutation([seed, "batches", epoch, 1], parts.length).map((i) => parts[i]);
}

/** Rows, shortest first, those of one length in their order. */
export const byLength = (rows, lengths) => [...rows].sort((a, b) => lengths[a] - lengths[b]);
