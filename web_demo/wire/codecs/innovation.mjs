/**
 * `innovation`: how an update differs from the one that was sent last, which both sides remember, in few bits; as Python's
 * `contracts/codecs/innovation`, which names the papers, bit for bit. A payload without parts repeats the last update.
 */
import { array, bytesOf, floats, sameShape } from "../../engine/arrays.mjs";
import { WireError } from "../../engine/errors.mjs";
import { sha256 } from "../../engine/sha256.mjs";
import { asKind, CHAIN, chainOf, known, ofKind } from "./memory.mjs";
import { bytesFor, checkBits, checkLength, checkNoRatio, checkParts, packedBits, sorted, unpackedBits } from "./numbers.mjs";

/** Kind of memory: the last update by tensor, float32. */
export const LAST = "innovation";
/** Kind of memory: updates in a row that repeated the last one, int64 (1,); absent for none. */
export const SKIPS = "skips";
export const SKIPS_MAX = 10;
const EXTRA = 2, BITS_MAX = 16, WIDTHS = [1, 2, 4, 8, 16], PARTS = ["values", "scales", "protocol"], LEAST = 2 ** -100, LARGEST = 2 ** 100;
const { abs, fround } = Math;

export function innovation(ratio, bits) {
  checkNoRatio("innovation", ratio);
  checkBits("innovation", bits, Array.from({ length: BITS_MAX }, (_, i) => i + 1));
  return {
    remembers: [LAST, CHAIN, SKIPS],
    encode(values, reference, memory) {
      const names = sorted(values), last = ofKind(LAST, memory), ranges = new Float32Array(names.length), levels = new Uint8Array(names.length);
      const now = {}, codes = [];
      names.forEach((name, i) => {
        const update = values[name].data.map((value, at) => value - reference[name].data[at]), before = beforeOf(last, name, reference);
        const found = before ? update.map((x, at) => x - before[at]) : update;
        ranges[i] = rangeOf(found);
        levels[i] = bits || levelOf(found, ranges[i]);
        codes.push(codesOf(found, ranges[i], levels[i]));
        now[name] = floats(values[name].shape, after(before, codes[i], ranges[i], levels[i]));
      });
      const parts = { values: packedByWidth(codes, levels), scales: bytesOf({ data: ranges }), protocol: levels };
      return { parts, conveyed: over(reference, now), memory: next(memory, parts, now) };
    },
    decode(parts, reference, memory) {
      checkParts("innovation", parts, PARTS);
      const names = sorted(reference);
      if (names.length && !Object.keys(parts).length) return repeated(reference, memory);
      const last = ofKind(LAST, memory), { ranges, levels } = gridOf(parts, names.length), now = {};
      const pieces = unpackedByWidth(parts.values ?? new Uint8Array(0), levels, names.map((name) => reference[name].data.length));
      names.forEach((name, i) => (now[name] = floats(reference[name].shape, after(beforeOf(last, name, reference), pieces[i], ranges[i], levels[i]))));
      return { values: over(reference, now), memory: next(memory, parts, now) };
    },
  };
}

/** A codec that sends the names alone: the last update of each counts again. WireError if one is not remembered, or after SKIPS_MAX in a row. */
export const repeating = (codec) => ({
  ...codec,
  encode(values, reference, memory) {
    const { values: conveyed, memory: kept } = repeated(Object.fromEntries(sorted(values).map((name) => [name, reference[name]])), memory);
    return { parts: {}, conveyed, memory: kept };
  },
});

/** How many updates in a row have repeated the last one. */
export const skipsOf = (memory) => Number(memory[`${SKIPS}/`]?.data[0] ?? 0);

/** Whether an update is worth no upload; squared norms, `moved2` as an offer's `lazy`. Source: LAQ, condition (7a). */
export const isLazy = (stepNorm2, errorsNorm2, moved2) => moved2 > 0 && stepNorm2 <= moved2 + 3 * errorsNorm2;

function repeated(reference, memory) {
  const last = ofKind(LAST, memory), count = skipsOf(memory) + 1, names = sorted(reference);
  const lacking = names.find((name) => !beforeOf(last, name, reference));
  if (lacking !== undefined) throw new WireError(`innovation: ${lacking} is repeated, and no update of it is remembered`);
  if (count > SKIPS_MAX) throw new WireError(`innovation: repeated more than ${SKIPS_MAX} times in a row`);
  const now = Object.fromEntries(names.map((name) => [name, last[name]]));
  return { values: over(reference, now), memory: { ...next(memory, {}, now), [`${SKIPS}/`]: array("int64", [1], BigInt64Array.of(BigInt(count))) } };
}

const over = (reference, now) => Object.fromEntries(Object.entries(now).map(([name, { shape, data }]) =>
  [name, array("float64", shape, Float64Array.from(data, (step, i) => reference[name].data[i] + step))]));

function beforeOf(last, name, reference) {
  const found = last[name];
  return found && found.data instanceof Float32Array && sameShape(found.shape, reference[name].shape) ? found.data : null;
}

/** The memory after a payload: its updates in the place of the last ones, and another link of the chain. */
function next(memory, parts, now) {
  const text = new TextEncoder(), told = PARTS.map((kind) => parts[kind] ?? new Uint8Array(0));
  const link = [text.encode(`${chainOf(memory)}${Object.keys(now).join("\n")}\0`), ...told];
  const whole = new Uint8Array(link.reduce((sum, piece) => sum + piece.length, 0));
  link.reduce((place, piece) => (whole.set(piece, place), place + piece.length), 0);
  return { ...known(memory, [LAST]), ...asKind(LAST, now), [`${CHAIN}/`]: array("uint8", [32], sha256(whole)) };
}

/** Largest magnitude; 0 for less than LEAST. */
function rangeOf(found) {
  const span = found.reduce((most, x) => (abs(x) > most || Number.isNaN(x) ? abs(x) : most), 0);
  if (!(span <= LARGEST)) throw new WireError("cannot pack: a difference beyond 2**100 does not fit innovation");
  return span < LEAST ? 0 : span;
}

/** AQUILA's level, and EXTRA bits. */
function levelOf(found, span) {
  if (!span) return 1;
  const norm = Math.sqrt(pairwise(Float64Array.from(found, (x) => x * x)));
  return Math.min(BITS_MAX, Math.trunc(Math.log2((span * Math.sqrt(found.length)) / norm + 1)) + EXTRA);
}

/** A sum in numpy's order: the level, which is a floor of it, would else differ now and then. @param {Float64Array} values */
export function pairwise(values) {
  const n = values.length;
  if (n < 8) return values.reduce((sum, x) => sum + x, 0);
  if (n > 128) {
    const half = Math.floor(n / 2) - (Math.floor(n / 2) % 8);
    return pairwise(values.subarray(0, half)) + pairwise(values.subarray(half));
  }
  const r = values.slice(0, 8), whole = n - (n % 8);
  for (let i = 8; i < whole; i++) r[i % 8] += values[i];
  const sum = r[0] + r[1] + (r[2] + r[3]) + (r[4] + r[5] + (r[6] + r[7]));
  return values.subarray(whole).reduce((total, x) => total + x, sum);
}

/** Nearest of 2**level points from -span to span. */
function codesOf(found, span, level) {
  const top = 2 ** level - 1, scale = span ? fround(top / fround(2 * span)) : 0;
  return Uint16Array.from(found, (x) => Math.min(fround(fround(fround(x + span) * scale) + 0.5), top));
}

/** The update that both sides know once the codes have come. */
function after(before, codes, span, level) {
  const step = fround(fround(2 * span) / (2 ** level - 1));
  return Float32Array.from(codes, (code, i) => {
    const found = fround(fround(code * step) - span);
    return before ? found + before[i] : found;
  });
}

const widthOf = (level) => WIDTHS.find((width) => width >= level);

/** Codes of tensors side by side by their width in bits, narrowest first. */
function packedByWidth(codes, levels) {
  const groups = WIDTHS.map((width) => packedBits(codes.flatMap((own, i) => (widthOf(levels[i]) === width ? [...own] : [])), width));
  return Uint8Array.from(groups.flatMap((group) => [...group]));
}

function unpackedByWidth(data, levels, sizes) {
  const counts = WIDTHS.map((width) => sizes.reduce((sum, size, i) => sum + (widthOf(levels[i]) === width ? size : 0), 0));
  checkLength(data, counts.reduce((sum, count, i) => sum + bytesFor(count, WIDTHS[i]), 0), "innovation's values");
  let place = 0;
  const groups = WIDTHS.map((width, i) => unpackedBits(data.subarray(place, (place += bytesFor(counts[i], width))), width, counts[i])), taken = WIDTHS.map(() => 0);
  return sizes.map((size, i) => {
    const group = WIDTHS.indexOf(widthOf(levels[i])), piece = groups[group].subarray(taken[group], (taken[group] += size));
    if (piece.some((code) => code >= 2 ** levels[i])) throw new WireError("innovation: a value beyond its level");
    return piece;
  });
}

/** Range and level of each tensor. */
function gridOf({ scales = new Uint8Array(0), protocol = new Uint8Array(0) }, count) {
  if (scales.length !== 4 * count || protocol.length !== count) throw new WireError(`innovation: ranges or levels are not those of ${count} tensors`);
  const ranges = new Float32Array(scales.slice().buffer);
  if (!ranges.every((range) => range >= 0 && range <= LARGEST)) throw new WireError("innovation: a range is negative, not finite or beyond 2**100");
  if (!protocol.every((level) => level >= 1 && level <= BITS_MAX)) throw new WireError(`innovation: a level is not from 1 to ${BITS_MAX}`);
  return { ranges, levels: protocol };
}
