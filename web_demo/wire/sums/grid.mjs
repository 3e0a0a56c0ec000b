/** Updates as whole numbers on a public grid, as Python's `secure_sums/grid`, to the byte: their sum is exact in any order. */
import { sameShape } from "../../engine/arrays.mjs";
import { words } from "../../engine/draws.mjs";
import { ConfigError, WireError } from "../../engine/errors.mjs";
import { compareText } from "../../engine/safetensors.mjs";

const MODULUS_BITS_MAX = 62, PIECE = 2 ** 16;

/** @typedef {{bits: number, weight_bits: number, summands: number, limit: number}} Grid */

/** Bits of one element of a sum; ConfigError for a grid that has none, or too many. @param {Grid} grid */
export function modulusBits(grid) {
  const found = grid.bits + grid.weight_bits + grid.summands.toString(2).length;
  if (grid.bits < 2 || grid.summands < 1 || !(grid.limit > 0) || found > MODULUS_BITS_MAX)
    throw new ConfigError(
      `grid of ${grid.bits} bits, ${grid.weight_bits} of weight, ${grid.summands} devices and range ${grid.limit}: expected 2 bits or more, at least one device, and at most ${MODULUS_BITS_MAX} bits in all`,
    );
  return found;
}

/** Weight of a device: its samples, as many as the grid can tell; 1 of every device if it tells none. */
export const weightOf = (grid, numSamples) => (grid.weight_bits ? Math.min(Math.max(numSamples, 1), 2 ** grid.weight_bits - 1) : 1);

/**
 * Put a device's update on the grid.
 * @param {import("../../engine/arrays.mjs").Arrays} values what it trained, any subset of the reference's tensors
 * @param {import("../../engine/arrays.mjs").Arrays} reference
 * @param {Grid} grid
 * @param {{weight: number, seed: number}} how `seed` of the rounding
 * @returns {{numbers: BigUint64Array, numCut: number}} a number for each element by name, and the weight; WireError for a value that cannot be packed
 */
export function placed(values, reference, grid, { weight, seed }) {
  checkValues(values, reference);
  const steps = changes(values, reference), scale = 2 ** (grid.bits - 1) / grid.limit, most = 2 ** (grid.bits - 1) - 1, below = belowOf(grid);
  const numbers = new BigUint64Array(steps.length + 1);
  let numCut = 0;
  for (let start = 0; start < steps.length; start += PIECE) {
    const draws = words([seed, "rounding", start / PIECE, 1], Math.min(PIECE, steps.length - start));
    draws.forEach((word, i) => {
      const step = Math.floor(steps[start + i] * scale + word / 2 ** 32);
      if (Math.abs(step) > most) numCut++;
      numbers[start + i] = BigInt(Math.max(-most, Math.min(most, step)) * weight) & below;
    });
  }
  numbers[steps.length] = BigInt(weight) & below;
  return { numbers, numCut };
}

/** Reduce numbers modulo the grid's power of two, in place. */
export function reduced(numbers, grid) {
  const below = belowOf(grid);
  for (let i = 0; i < numbers.length; i++) numbers[i] &= below;
}

/** Numbers side by side, lowest bits first. @returns {Uint8Array} */
export function writeNumbers(numbers, grid) {
  const width = modulusBits(grid), low = Math.min(width, 32), high = width - low, out = new Uint8Array(Math.ceil((numbers.length * width) / 8));
  const halves = new Uint32Array(numbers.buffer, numbers.byteOffset, 2 * numbers.length);
  let at = 0;
  for (let i = 0; i < numbers.length; i++) {
    put(out, at, halves[2 * i], low);
    if (high) put(out, at + 32, halves[2 * i + 1], high);
    at += width;
  }
  return out;
}

/** Bits of a word from a place in bits on. */
function put(out, at, word, count) {
  for (let done = 0; done < count; ) {
    const shift = (at + done) & 7, taken = Math.min(8 - shift, count - done);
    out[(at + done) >>> 3] |= ((word >>> done) & ((1 << taken) - 1)) << shift;
    done += taken;
  }
}

const belowOf = (grid) => (1n << BigInt(modulusBits(grid))) - 1n;

/** Float64 of all tensors by name; zeros for those without a value. */
function changes(values, reference) {
  const names = Object.keys(reference).sort(compareText), found = new Float64Array(names.reduce((sum, name) => sum + reference[name].data.length, 0));
  let start = 0;
  for (const name of names) {
    const held = reference[name].data;
    values[name]?.data.forEach((value, i) => (found[start + i] = value - held[i]));
    start += held.length;
  }
  return found;
}

function checkValues(values, reference) {
  const problems = Object.entries(values).flatMap(([name, { shape, data }]) => {
    if (!reference[name]) return [`${name}: not in the reference`];
    if (!sameShape(shape, reference[name].shape)) return [`${name}: shape [${shape}], the reference has [${reference[name].shape}]`];
    return data.every(Number.isFinite) ? [] : [`${name}: not finite`];
  });
  if (problems.length) throw new WireError(`cannot pack: ${problems.join("; ")}`);
}
