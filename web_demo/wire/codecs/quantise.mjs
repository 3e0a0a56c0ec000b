/** Elements in few bits, one scale for each block, rounded at random by docs/draws.md or to the nearest; as Python's `quantise`, bit for bit. */
import { rint } from "../../engine/arrays.mjs";
import { words } from "../../engine/draws.mjs";
import { WireError } from "../../engine/errors.mjs";
import { hex, Sha256 } from "../../engine/sha256.mjs";
import { bitsOf, bytesFor, floatsOf, packedBits, unpackedBits } from "./numbers.mjs";

const { fround, abs } = Math, BLOCK = 128, PIECE = 2 ** 16, LEAST = 2 ** -100, LARGEST = 2 ** 100;
const levelsOf = (bits) => Math.max(1, 2 ** (bits - 1) - 1);
const packedWidth = (bits) => (bits === 3 ? 4 : bits);
const numBlocks = (count) => Math.ceil(count / BLOCK);

/** Upper halves of float32 scales as float32. */
const wideOf = (scales) => floatsOf(Uint32Array.from(scales, (s) => s << 16));

/**
 * @param {Float32Array} flat
 * @param {?string} name goes into the seed of the draws; null to round to the nearest
 * @returns {{codes: Uint8Array, scales: Uint8Array, conveyed: Float32Array}}
 */
export function quantise(flat, bits, name) {
  const stored = Uint16Array.from({ length: numBlocks(flat.length) }, (_, b) => scaleOf(flat.subarray(b * BLOCK, (b + 1) * BLOCK), bits));
  const scales = new Uint8Array(stored.buffer);
  const seed = name === null ? null : parseInt(hex(new Sha256().update(new TextEncoder().encode(`${name}\0`)).update(scales).digest()).slice(0, 13), 16);
  const wide = wideOf(stored), codes = new (bits === 16 ? Uint16Array : Uint8Array)(flat.length), levels = levelsOf(bits);
  for (let start = 0; start < flat.length; start += PIECE) {
    const end = Math.min(start + PIECE, flat.length);
    const drawn = bits === 1 || seed === null ? null : words([seed, "rounding", start / PIECE, 0], (numBlocks(end - start) * BLOCK) / (bits === 8 ? 4 : 2));
    for (let i = start; i < end; i++) {
      if (bits === 1) {
        codes[i] = flat[i] >= 0 ? 1 : 0;
        continue;
      }
      const scale = wide[Math.floor(i / BLOCK)], exact = scale > 0 ? (levels * 2 ** 16 * (1 - 2 ** -22)) / scale : 0;
      const step = bits === 16 ? flat[i] * exact : fround(flat[i] * fround(exact));
      codes[i] = ((rint(step) + drawOf(drawn, i - start, bits)) >> 16) + levels;
    }
  }
  return { codes: packedBits(codes, packedWidth(bits)), scales, conveyed: valuesOf(codes, wide, bits) };
}

/** Number `j` of the draws from 0 to 2^16 - 1, two from each word, and for 8 bits four: the middles of 256ths; a half where none are drawn. */
function drawOf(drawn, j, bits) {
  if (drawn === null) return 2 ** 15;
  if (bits === 8) return ((drawn[j >> 2] >>> (8 * (j % 4))) & 0xff) * 256 + 128;
  return j % 2 ? drawn[j >> 1] >>> 16 : drawn[j >> 1] & 0xffff;
}

/** The elements that `quantise` conveyed. */
export function restore(codes = new Uint8Array(0), scales = new Uint8Array(0), bits, count) {
  const width = packedWidth(bits), expected = bytesFor(count, width);
  if (codes.length !== expected || scales.length !== 2 * numBlocks(count))
    throw new WireError(`${codes.length} bytes of values and ${scales.length} of scales, expected ${expected} and ${2 * numBlocks(count)}`);
  const wide = wideOf(new Uint16Array(scales.slice().buffer));
  if (wide.some((s) => !(s >= 0 && s <= LARGEST))) throw new WireError("a scale is negative, not finite or beyond 2**100");
  return valuesOf(unpackedBits(codes, width, count), wide, bits);
}

function valuesOf(codes, wide, bits) {
  const levels = levelsOf(bits), steps = wide.map((s) => s / levels);
  return Float32Array.from(codes, (code, i) => ((bits === 1 ? 2 * code : code) - levels) * steps[Math.floor(i / BLOCK)]);
}

function scaleOf(block, bits) {
  const top = block.reduce((most, x) => Math.max(most, abs(x)), 0);
  if (!(top <= LARGEST / 2)) throw new WireError("cannot pack: a difference beyond 2**99 does not fit");
  if (top < LEAST) return 0;
  const found = Float32Array.of(bits === 1 ? even(block) : top);
  return (bitsOf(found)[0] + 0xffff) >>> 16;
}

/** The scale of signs with which a block moves as far in its own direction as it should, or 1.5 times the mean magnitude. */
function even(block) {
  const sum = summed(new Float32Array(8), block, abs);
  return Math.min(summed(new Float64Array(8), block, (x) => x * x) / sum, (1.5 * sum) / block.length);
}

/** Of `of` each element, in numpy's order: eight running sums, then in pairs, all in the precision of `sums`. */
function summed(sums, block, of) {
  for (let i = 0; i < BLOCK; i++) sums[i % 8] += of(block[i] ?? 0);
  for (let width = 4; width >= 1; width /= 2) for (let i = 0; i < width; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];
  return sums[0];
}
