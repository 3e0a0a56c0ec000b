/** What codecs share: joined tensors, differences, bits, places, planes; names and arithmetic as in Python's `contracts/codecs`. */
import { array, floats, halfBits, halfValue, sizeOf, zeros } from "../../engine/arrays.mjs";
import { ConfigError, oneLine, WireError } from "../../engine/errors.mjs";
import { compareText } from "../../engine/safetensors.mjs";

/** @typedef {import("../../engine/arrays.mjs").Arrays} Arrays */

/** Names in the order of code points. */
export const sorted = (arrays) => Object.keys(arrays).sort(compareText);
export const countOf = (arrays) => Object.values(arrays).reduce((sum, { shape }) => sum + sizeOf(shape), 0);

/** Elements of tensors one after the other. */
export function joined(arrays, names, Type = Float32Array) {
  const flat = new Type(names.reduce((sum, name) => sum + arrays[name].data.length, 0));
  let place = 0;
  for (const name of names) {
    flat.set(arrays[name].data, place);
    place += arrays[name].data.length;
  }
  return flat;
}

/** Differences from the reference in float32, joined in the order of names. */
export function moved(values, reference) {
  const names = sorted(values), to = joined(values, names), from = joined(reference, names);
  return to.map((value, i) => value - from[i]);
}

/** Tensors of a joined array, in the shapes of `like`. @returns {Arrays} */
export function parted(flat, like, names, dtype = "float32") {
  let place = 0;
  return Object.fromEntries(names.map((name) => {
    const { shape, data } = like[name], part = array(dtype, shape, flat.slice(place, place + data.length));
    place += data.length;
    return [name, part];
  }));
}

/** Reference plus joined steps, in float64. @returns {Arrays} */
export const shifted = (reference, steps, names) =>
  parted(joined(reference, names, Float64Array).map((value, i) => value + steps[i]), reference, names, "float64");

/** Float32, from float64 too. @returns {Arrays} */
export const asFloats32 = (arrays) =>
  Object.fromEntries(Object.entries(arrays).map(([n, a]) => [n, a.dtype === "float32" ? a : floats(a.shape, Float32Array.from(a.data))]));

export function checkFinite(arrays) {
  for (const [name, { data }] of Object.entries(arrays)) if (data.some((x) => !Number.isFinite(x))) throw new WireError(`${name}: NaN or infinity`);
}

export function checkLength(part, expected, what) {
  if ((part?.length ?? 0) !== expected) throw new WireError(`${part?.length ?? 0} bytes of ${what}, expected ${expected}`);
}

export function checkRatio(name, ratio) {
  if (!(ratio > 0 && ratio <= 1)) throw new ConfigError(`codec ${name}: its ratio is above 0 and at most 1, got ${ratio}`);
}

/** A codec that sends every element has no ratio: 1, or 0 for none. */
export function checkNoRatio(name, ratio) {
  if (ratio !== 0 && ratio !== 1) throw new ConfigError(`codec ${name} sends all elements and has no ratio, got ${ratio}`);
}

export function checkParts(name, parts, known) {
  const strange = Object.keys(parts).find((kind) => !known.includes(kind));
  if (strange !== undefined) throw new WireError(`${name}: no part ${oneLine(strange, 40)}`);
}

export function checkBits(name, bits, have) {
  if (bits && !have.includes(bits)) throw new ConfigError(`codec ${name}: its bits are ${have.join(" or ") || "its own"}, got ${bits}`);
}

/** Bytes that so many codes take. */
export const bytesFor = (count, width) => Math.ceil((count * width) / 8);

/** Codes of 1, 2, 4, 8 or 16 bits side by side, lowest first. @returns {Uint8Array} */
export function packedBits(codes, width) {
  if (width === 16) return new Uint8Array(Uint16Array.from(codes).buffer);
  const packed = new Uint8Array(bytesFor(codes.length, width)), each = 8 / width;
  for (let i = 0; i < codes.length; i++) packed[Math.floor(i / each)] |= codes[i] << (width * (i % each));
  return packed;
}

export function unpackedBits(bytes, width, count) {
  if (width === 16) return Uint16Array.from({ length: count }, (_, i) => bytes[2 * i] | (bytes[2 * i + 1] << 8));
  const each = 8 / width, mask = 2 ** width - 1;
  return Uint8Array.from({ length: count }, (_, i) => (bytes[Math.floor(i / each)] >> (width * (i % each))) & mask);
}

/** Bits of halves and their values; WireError for a magnitude that no half holds. */
export function halved(values, codec) {
  const halves = Uint16Array.from(values, halfBits), wide = new values.constructor(values.length);
  for (let i = 0; i < wide.length; i++) {
    if ((halves[i] & 0x7fff) >= 0x7c00) throw new WireError(`cannot pack: a difference beyond 65504 does not fit ${codec}`);
    wide[i] = halfValue(halves[i]);
  }
  return { halves, wide };
}

/** Which are the `num` largest of magnitudes, of equal ones the first; zeros are none. @returns {Uint8Array} */
export function largest(magnitudes, num) {
  const order = [...magnitudes.keys()].filter((i) => magnitudes[i] > 0), taken = new Uint8Array(magnitudes.length);
  if (num < order.length) order.sort((a, b) => magnitudes[b] - magnitudes[a] || a - b);
  for (const i of order.slice(0, num)) taken[i] = 1;
  return taken;
}

/** The share `ratio` of `count`, rounded up, at least one. */
export const numOf = (ratio, count) => Math.min(count, Math.max(1, Math.ceil(ratio * count)));

/** Places of what is set. */
export const placesOf = (mask) => [...mask.keys()].filter((i) => mask[i]);

const FEW = 0.3, CODED = 256, MORE = 255;

/** Which elements travel: a bitmap, or gaps between the rarer ones. @param {Uint8Array} mask */
export function packedPositions(mask) {
  const num = mask.reduce((sum, bit) => sum + bit, 0), count = mask.length;
  if (Math.min(num, count - num) <= FEW * count) {
    const [form, rarer] = 2 * num <= count ? [1, mask] : [2, mask.map((bit) => 1 - bit)], gaps = gapsOf(placesOf(rarer));
    if (gaps.length >= CODED || gaps.length <= bytesFor(count, 1)) return Uint8Array.of(form, ...gaps);
  }
  return Uint8Array.of(0, ...packedBits(mask, 1));
}

function gapsOf(places) {
  const gaps = [];
  places.forEach((place, i) => {
    let passed = i ? place - places[i - 1] - 1 : place;
    for (; passed >= MORE; passed -= MORE) gaps.push(MORE);
    gaps.push(passed);
  });
  return gaps;
}

/** @returns {Uint8Array} a mask of `count`; WireError if the part does not say */
export function unpackedPositions(part = new Uint8Array(0), count) {
  const wrong = () => new WireError(`${part.length} bytes of positions do not say which of ${count} elements travel`);
  const form = part[0], body = part.subarray(1);
  if (form === 0) {
    if (body.length !== bytesFor(count, 1) || (count % 8 && body.at(-1) >> count % 8)) throw wrong();
    return unpackedBits(body, 1, count);
  }
  if ((form !== 1 && form !== 2) || body.at(-1) === MORE) throw wrong();
  const mask = new Uint8Array(count).fill(form === 2 ? 1 : 0);
  let place = -1;
  for (const gap of body) {
    place += gap + (gap < MORE ? 1 : 0);
    if (gap === MORE) continue;
    if (place >= count) throw wrong();
    mask[place] = form === 1 ? 1 : 0;
  }
  return mask;
}

/** Values by bytes of equal rank: `values` the lower ones, `values-high` the highest. @param {Uint16Array|Uint32Array} words bits of halves or floats */
export function planes(words) {
  const n = words.length, high = new Uint8Array(n);
  if (words instanceof Uint16Array) {
    words.forEach((w, i) => (high[i] = w >> 8));
    return { values: Uint8Array.from(words, (w) => w & 255), "values-high": high };
  }
  const low = new Uint8Array(3 * n);
  words.forEach((w, i) => {
    [low[2 * i], low[2 * i + 1], low[2 * n + i], high[i]] = [w & 255, (w >> 8) & 255, (w >> 16) & 255, w >>> 24];
  });
  return { values: low, "values-high": high };
}

/** The words of two parts. @param {2|4} width */
export function joinedPlanes(parts, width, count) {
  const low = parts.values ?? zeros("uint8", [0]).data, high = parts["values-high"] ?? new Uint8Array(0);
  if (low.length !== (width - 1) * count || high.length !== count)
    throw new WireError(`${low.length} and ${high.length} bytes of values, expected ${(width - 1) * count} and ${count}`);
  if (width === 2) return Uint16Array.from({ length: count }, (_, i) => low[i] | (high[i] << 8));
  return Uint32Array.from({ length: count }, (_, i) => low[2 * i] | (low[2 * i + 1] << 8) | (low[2 * count + i] << 16) | (high[i] << 24));
}

/** Bits of float32 values, and back; views. */
export const bitsOf = (values) => new Uint32Array(values.buffer, values.byteOffset, values.length);
export const floatsOf = (words) => new Float32Array(words.buffer, words.byteOffset, words.length);
