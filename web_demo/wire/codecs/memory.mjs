/** What one side of a codec keeps from payload to payload, flat: `kind/tensor` -> array; as Python's `Memory`. */
import { hex } from "../../engine/sha256.mjs";

/** @typedef {import("../../engine/arrays.mjs").Arrays} Arrays */

/** Kind of memory by which both sides of a codec see that they have the same. */
export const CHAIN = "chain";
/** Kind of memory: float64 by tensor, what payloads could not convey. */
export const RESIDUAL = "residual";

/** Arrays of one kind, by tensor. @param {Arrays} memory @returns {Arrays} */
export const ofKind = (kind, memory) =>
  Object.fromEntries(Object.entries(memory).filter(([key]) => key.startsWith(`${kind}/`)).map(([key, value]) => [key.slice(kind.length + 1), value]));

/** Arrays by tensor as one kind. @param {Arrays} arrays @returns {Arrays} */
export const asKind = (kind, arrays) => Object.fromEntries(Object.entries(arrays).map(([name, value]) => [`${kind}/${name}`, value]));

/** What is of these kinds. @param {Arrays} memory @param {string[]} kinds @returns {Arrays} */
export const known = (memory, kinds) => Object.fromEntries(Object.entries(memory).filter(([key]) => kinds.includes(key.split("/", 1)[0])));

/** Digest, in hexadecimal, of the payloads that made a memory; empty for none. @param {Arrays} memory */
export const chainOf = (memory) => (memory[`${CHAIN}/`] ? hex(memory[`${CHAIN}/`].data) : "");
