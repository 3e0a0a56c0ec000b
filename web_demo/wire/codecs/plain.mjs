/** Codecs that know one tensor at a time: fp32, fp16 and int8. Each is encode (value, reference) and decode (part, reference). */
import { array, bytesOf, floats, rint } from "../../engine/arrays.mjs";
import { WireError } from "../../engine/errors.mjs";
import { bitsOf, checkLength, halved } from "./numbers.mjs";
import { halfValue } from "../../engine/arrays.mjs";

const GROUP = 256;
const doubles = ({ shape, data }, steps) => array("float64", shape, Float64Array.from(data, (value, i) => value + steps[i]));
const difference = (value, reference) => Float64Array.from(value.data, (v, i) => v - reference.data[i]);

/** A view over copied bytes, so that any boundary will do. */
const viewed = (Type, part) => new Type(part.slice().buffer);

export const fp32 = {
  encode: (value) => ({ part: bytesOf(value).slice(), conveyed: value }),
  decode(part, reference) {
    checkLength(part, 4 * reference.data.length, "fp32");
    return floats(reference.shape, viewed(Float32Array, part));
  },
};

export const fp16 = {
  encode(value, reference) {
    const { halves, wide } = halved(difference(value, reference), "fp16");
    return { part: bytesOf({ data: halves }), conveyed: doubles(reference, wide) };
  },
  decode(part, reference) {
    checkLength(part, 2 * reference.data.length, "fp16");
    return doubles(reference, Float64Array.from(viewed(Uint16Array, part), halfValue));
  },
};

export const int8 = {
  encode(value, reference) {
    const steps = difference(value, reference), count = steps.length, groups = Math.ceil(count / GROUP);
    const scales = new Float32Array(groups), part = new Uint8Array(4 * groups + count), codes = new Int8Array(part.buffer, 4 * groups);
    for (let g = 0; g < groups; g++) {
      const own = steps.subarray(g * GROUP, (g + 1) * GROUP), peak = own.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
      if (!peak) continue;
      scales[g] = peak / 127;
      bitsOf(scales)[g] += 1; // rounded up: the peak stays within the steps
      own.forEach((x, i) => (codes[g * GROUP + i] = rint(x / scales[g])));
    }
    part.set(bytesOf({ data: scales }));
    return { part, conveyed: stepped(scales, codes, reference) };
  },
  decode(part, reference) {
    const count = reference.data.length, groups = Math.ceil(count / GROUP);
    checkLength(part, 4 * groups + count, "int8");
    const scales = viewed(Float32Array, part.subarray(0, 4 * groups));
    if (scales.some((s) => !(s >= 0 && Number.isFinite(s)))) throw new WireError("int8: a scale is negative or not finite");
    return stepped(scales, viewed(Int8Array, part.subarray(4 * groups)), reference);
  },
};

const stepped = (scales, codes, reference) => doubles(reference, Float64Array.from(codes, (step, i) => step * scales[Math.floor(i / GROUP)]));
