/** Codecs of all tensors together: xor, quant, topk and the three caesar. Each makes { encode, decode } of (ratio, bits). */
import { array, bytesOf, halfValue } from "../../engine/arrays.mjs";
import { WireError } from "../../engine/errors.mjs";
import {
  bitsOf, bytesFor, checkBits, checkParts, checkRatio, countOf, floatsOf, halved, joined, joinedPlanes, largest, moved, numOf, packedBits, packedPositions,
  parted, placesOf, planes, shifted, sorted, unpackedBits, unpackedPositions,
} from "./numbers.mjs";
import { quantise, restore } from "./quantise.mjs";

const { abs, fround } = Math;
const RANKS = ["values-0", "values-1", "values-2", "values-3"];

/** To the bit: what differs from the reference in the bits of float32, by bytes of equal rank. */
export const xor = () => ({
  encode(values, reference) {
    const names = sorted(values), held = bitsOf(joined(reference, names)), changed = bitsOf(joined(values, names)).map((bits, i) => bits ^ held[i]);
    return { parts: Object.fromEntries(RANKS.map((part, rank) => [part, Uint8Array.from(changed, (bits) => bits >>> (8 * rank))])), conveyed: values };
  },
  decode(parts, reference) {
    checkParts("xor", parts, RANKS);
    const names = sorted(reference), n = countOf(reference), ranks = RANKS.map((part) => parts[part] ?? new Uint8Array(0));
    if (ranks.some(({ length }) => length !== n)) throw new WireError(`xor: ranks of ${ranks.map(({ length }) => length)} bytes, expected ${n} each`);
    const bits = bitsOf(joined(reference, names));
    ranks.forEach((own, rank) => own.forEach((byte, i) => (bits[i] ^= byte << (8 * rank))));
    return parted(floatsOf(bits), reference, names);
  },
});

export function quant(ratio, bits) {
  checkBits("quant", bits, [1, 2, 3, 4, 8, 16]);
  const width = bits || 8;
  return {
    encode(values, reference) {
      const names = sorted(values), drawnBy = width === 16 ? null : names.join("\n"); // a step of 16 bits is too small for its mean to matter
      const { codes, scales, conveyed } = quantise(moved(values, reference), width, drawnBy);
      const own = width === 16 ? planes(new Uint16Array(codes.buffer)) : { values: codes };
      return { parts: { ...own, scales }, conveyed: shifted(reference, conveyed, names) };
    },
    decode(parts, reference) {
      checkParts("quant", parts, ["values", "scales", ...(width === 16 ? ["values-high"] : [])]);
      const names = sorted(reference), count = countOf(reference);
      const codes = width === 16 ? bytesOf({ data: joinedPlanes(parts, 2, count) }) : parts.values;
      return shifted(reference, restore(codes, parts.scales, width, count), names);
    },
  };
}

export function topk(ratio, bits) {
  checkRatio("topk", ratio);
  checkBits("topk", bits, [4, 8, 16]);
  return bits ? sparse(ratio, bits) : firstTopk(ratio);
}

/** As release 0.1.0 packed it: in frame 1, a part for each tensor. */
function firstTopk(ratio) {
  return {
    encode(values, reference) {
      const names = sorted(values), to = joined(values, names, Float64Array), from = joined(reference, names, Float64Array);
      const steps = to.map((v, i) => v - from[i]), taken = largest(steps.map(abs), numOf(ratio, steps.length)), parts = {}, after = from.slice();
      let start = 0;
      for (const name of names) {
        const n = values[name].data.length, mask = taken.subarray(start, start + n), at = placesOf(mask);
        const { halves, wide } = halved(Float64Array.from(at, (i) => steps[start + i]), "topk");
        parts[name] = topkPart(mask, at, halves);
        at.forEach((place, i) => (after[start + place] += wide[i]));
        start += n;
      }
      return { parts, conveyed: parted(after, values, names, "float64") };
    },
    decode: (parts, reference) => Object.fromEntries(Object.entries(parts).map(([name, part]) => [name, topkValue(name, part, reference[name])])),
  };
}

function topkPart(mask, at, halves) {
  const listed = 4 * at.length < bytesFor(mask.length, 1);
  const places = listed ? bytesOf({ data: Uint32Array.from(at) }) : packedBits(mask, 1), part = new Uint8Array(1 + places.length + 2 * at.length);
  part.set([listed ? 1 : 0]);
  part.set(places, 1);
  part.set(bytesOf({ data: halves }), 1 + places.length);
  return part;
}

function topkValue(name, part, { shape, data }) {
  const wrong = () => new WireError(`${name}: topk: ${part.length} bytes do not say which of ${data.length} elements travel`);
  const body = part.slice(1), count = data.length;
  let at;
  if (part[0] === 1 && body.length % 6 === 0) at = [...new Uint32Array(body.buffer, 0, body.length / 6)];
  else if (part[0] === 0 && body.length >= bytesFor(count, 1)) at = placesOf(unpackedBits(body, 1, 8 * bytesFor(count, 1)));
  if (!at || at.some((place, i) => place >= count || (i && place <= at[i - 1]))) throw wrong();
  const size = (part[0] ? 4 * at.length : bytesFor(count, 1)) + 2 * at.length;
  if (body.length !== size) throw wrong();
  const halves = new Uint16Array(body.slice(body.length - 2 * at.length).buffer), after = Float64Array.from(data);
  at.forEach((place, i) => (after[place] += halfValue(halves[i])));
  return array("float64", shape, after);
}

function sparse(ratio, bits) {
  return {
    encode(values, reference) {
      const names = sorted(values), steps = moved(values, reference), mask = largest(steps.map(abs), numOf(ratio, steps.length)), at = placesOf(mask);
      const chosen = Float32Array.from(at, (i) => steps[i]), parts = { positions: packedPositions(mask) };
      let conveyed;
      if (bits === 16) {
        const { halves, wide } = halved(chosen, "topk");
        Object.assign(parts, planes(halves));
        conveyed = wide;
      } else {
        const found = quantise(chosen, bits, null); // to the nearest: what is not sent makes the mean wrong anyway
        Object.assign(parts, { values: found.codes, scales: found.scales });
        ({ conveyed } = found);
      }
      const after = new Float32Array(steps.length);
      at.forEach((place, i) => (after[place] = conveyed[i]));
      return { parts, conveyed: shifted(reference, after, names) };
    },
    decode(parts, reference) {
      checkParts("topk", parts, ["values", "values-high", "scales", "positions"]);
      const count = countOf(reference), at = placesOf(unpackedPositions(parts.positions, count)), steps = new Float32Array(count);
      const chosen = bits === 16 ? Float32Array.from(joinedPlanes(parts, 2, at.length), halfValue) : restore(parts.values, parts.scales, bits, at.length);
      at.forEach((place, i) => (steps[place] = chosen[i]));
      return shifted(reference, steps, sorted(reference));
    },
  };
}

/** Neighbours in the order of names that are equal up to their first number are one layer. @returns {string[][]} */
function layersOf(arrays) {
  const layers = [];
  let last;
  for (const name of sorted(arrays)) {
    const key = /^.*?\.\d+(?=\.)/.exec(name)?.[0] ?? "";
    if (key !== last) layers.push([]);
    layers.at(-1).push(name);
    last = key;
  }
  return layers;
}

/** The stale value where its sign and magnitude may be right, else the signed mean. */
export const byStale = (stale, isNegative, mean, top) => ((stale < 0) === isNegative && abs(stale) <= top ? stale : bySign(stale, isNegative, mean));
export const bySign = (_stale, isNegative, mean) => (isNegative ? -mean : mean);

/** @param {string} name @param {typeof byStale|null} recover null for zeros and no signs */
export const caesar = (name, recover) => (ratio, bits) => {
  checkRatio(name, ratio);
  checkBits(name, bits, [16, 32]);
  const half = bits === 16;
  return {
    encode(values, reference) {
      const masks = [], words = [], signs = [], scalars = [], conveyed = {};
      for (const names of layersOf(values)) {
        const flat = joined(values, names), stale = joined(reference, names), after = new Float32Array(flat.length);
        const mask = largest(flat.map(abs), Math.min(flat.length, Math.max(1, Math.floor(flat.length * ratio)))), at = placesOf(mask);
        const exact = Float32Array.from(at, (i) => flat[i]), { halves, wide } = half ? halved(exact, `${name} with 16 bits`) : { halves: bitsOf(exact), wide: exact };
        at.forEach((place, i) => (after[place] = wide[i]));
        masks.push(...mask);
        words.push(...halves);
        if (recover) {
          const left = [...flat.keys()].filter((i) => !mask[i]), top = left.reduce((most, i) => Math.max(most, abs(flat[i])), 0);
          const mean = Math.min(fround(left.reduce((sum, i) => sum + abs(flat[i]), 0) / Math.max(1, left.length)), top);
          for (const i of left) {
            after[i] = recover(stale[i], flat[i] < 0, mean, top);
            signs.push(flat[i] < 0 ? 1 : 0);
          }
          scalars.push(mean, top);
        }
        Object.assign(conveyed, parted(after, values, names));
      }
      const parts = { ...planes(half ? Uint16Array.from(words) : Uint32Array.from(words)), positions: packedPositions(Uint8Array.from(masks)) };
      if (recover) Object.assign(parts, { "values-signs": packedBits(signs, 1), scales: bytesOf({ data: Float32Array.from(scalars) }) });
      return { parts, conveyed };
    },
    decode(parts, reference) {
      checkParts(name, parts, ["values", "values-high", "positions", ...(recover ? ["values-signs", "scales"] : [])]);
      const layers = layersOf(reference), count = countOf(reference), mask = unpackedPositions(parts.positions, count);
      const num = mask.reduce((sum, bit) => sum + bit, 0), words = joinedPlanes(parts, half ? 2 : 4, num);
      const exact = half ? Float32Array.from(words, halfValue) : floatsOf(words), { signs, scalars } = restOf(parts, recover, count - num, layers.length, name);
      const found = {};
      let place = 0, taken = 0;
      layers.forEach((names, layer) => {
        const after = joined(reference, names), [mean, top] = [scalars[2 * layer], scalars[2 * layer + 1]];
        after.forEach((stale, i) => {
          if (mask[place]) after[i] = exact[taken++];
          else after[i] = recover ? recover(stale, signs[place - taken] === 1, mean, top) : 0;
          place++;
        });
        Object.assign(found, parted(after, reference, names));
      });
      return found;
    },
  };
};

function restOf(parts, recover, num, layers, name) {
  if (!recover) return { signs: [], scalars: [] };
  const { "values-signs": signs = new Uint8Array(0), scales = new Uint8Array(0) } = parts;
  if (signs.length !== bytesFor(num, 1) || scales.length !== 8 * layers) throw new WireError(`${name}: signs or scalars are not those of ${num} elements in ${layers} layers`);
  const scalars = new Float32Array(scales.slice().buffer);
  for (let i = 0; i < scalars.length; i += 2)
    if (!(scalars[i] >= 0 && scalars[i] <= scalars[i + 1] && Number.isFinite(scalars[i + 1])))
      throw new WireError(`${name}: a mean is negative, above its maximum or not finite`);
  return { signs: unpackedBits(signs, 1, num), scalars };
}
