/** Arrays as the engine holds them: a numpy dtype name, a shape, and a typed array over little-endian bytes. */
import { ArtifactError } from "./errors.mjs";

/**
 * @typedef {Object} NDArray
 * @property {string} dtype numpy's name; float16 is held as its bits, in a Uint16Array
 * @property {number[]} shape
 * @property {Float32Array | Float64Array | BigInt64Array | Int32Array | Int8Array | Uint8Array | Uint16Array} data
 * @typedef {Record<string, NDArray>} Arrays by name
 */

/** What holds the elements of each dtype, and bytes of one. */
export const TYPES = {
  bool: Uint8Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  uint64: BigUint64Array, float16: Uint16Array, float32: Float32Array, float64: Float64Array,
};

/** Elements of a shape. */
export const sizeOf = (shape) => shape.reduce((product, extent) => product * extent, 1);

/** @returns {NDArray} */
export const array = (dtype, shape, data) => ({ dtype, shape, data });

/** Zeros. @returns {NDArray} */
export const zeros = (dtype, shape) => array(dtype, shape, new TYPES[dtype](sizeOf(shape)));

/** Float32 of a shape. @returns {NDArray} */
export const floats = (shape, data) => array("float32", shape, data);

/**
 * A view of bytes as one array; a copy where the bytes do not lie on the boundary that the type needs.
 * @param {Uint8Array} bytes
 * @param {number} offset in bytes
 * @returns {NDArray}
 */
export function viewOf(bytes, dtype, shape, offset) {
  const Type = TYPES[dtype], size = sizeOf(shape) * Type.BYTES_PER_ELEMENT;
  if (offset < 0 || offset + size > bytes.length)
    throw new ArtifactError(`${dtype}[${shape}] at byte ${offset} ends beyond ${bytes.length} bytes`);
  const start = bytes.byteOffset + offset;
  if (start % Type.BYTES_PER_ELEMENT === 0) return array(dtype, shape, new Type(bytes.buffer, start, sizeOf(shape)));
  return array(dtype, shape, new Type(bytes.slice(offset, offset + size).buffer));
}

/** The bytes of an array, sharing its memory. */
export const bytesOf = ({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

/** A copy with memory of its own. @returns {NDArray} */
export const copyOf = ({ dtype, shape, data }) => array(dtype, [...shape], data.slice());

/** Copies by name. @returns {Arrays} */
export const copies = (arrays) => Object.fromEntries(Object.entries(arrays).map(([n, a]) => [n, copyOf(a)]));

export const sameShape = (a, b) => a.length === b.length && a.every((extent, i) => extent === b[i]);

/** Whether no element is NaN or infinite. */
export function isFinite32({ data }) {
  for (let i = 0; i < data.length; i++) if (!Number.isFinite(data[i])) return false;
  return true;
}

/** Rows (first axis) at `places` of an array. @returns {NDArray} */
export function takeRows({ dtype, shape, data }, places) {
  const width = sizeOf(shape.slice(1)), taken = new data.constructor(places.length * width);
  places.forEach((row, i) => taken.set(data.subarray(row * width, (row + 1) * width), i * width));
  return array(dtype, [places.length, ...shape.slice(1)], taken);
}

/** A copy of `whole` with some rows in place of its own. @returns {NDArray} */
export function withRows(whole, places, rows) {
  const width = sizeOf(whole.shape.slice(1)), merged = copyOf(whole);
  places.forEach((row, i) => merged.data.set(rows.data.subarray(i * width, (i + 1) * width), row * width));
  return merged;
}

/** Float32 values of float16 bits. */
export function widened(halves) {
  const wide = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) wide[i] = halfValue(halves[i]);
  return wide;
}

/** The number that 16 bits of an IEEE half stand for. */
export function halfValue(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 25) * (1024 + fraction) : sign * 2 ** -24 * fraction;
}

/** Bits of the half nearest to a number, of two equally near the even one; infinity from 65520 on. */
export function halfBits(value) {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0, size = Math.abs(value);
  if (Number.isNaN(value)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  let exponent = Math.max(-14, size ? exponentOf(size) : -14);
  let count = halfToEven(size * 2 ** (10 - exponent)); // exact: a power of two
  if (count === 2048) [count, exponent] = [1024, exponent + 1];
  return sign | (count < 1024 ? count : ((exponent + 15) << 10) | (count - 1024));
}

const PROBE = new DataView(new ArrayBuffer(8));

/** Floor of the binary logarithm of a normal double above 0. */
function exponentOf(size) {
  PROBE.setFloat64(0, size);
  return ((PROBE.getUint16(0) >> 4) & 2047) - 1023;
}

/** The whole number nearest to one that is not negative, of two equally near the even one. */
export function halfToEven(exact) {
  const below = Math.floor(exact), rest = exact - below;
  if (rest === 0.5) return below % 2 === 0 ? below : below + 1;
  return rest > 0.5 ? below + 1 : below;
}

/** As numpy's rint, negative numbers too. */
export const rint = (exact) => (exact < 0 ? -halfToEven(-exact) : halfToEven(exact));
