/** The part of an adapter that some work trains and sends up: no frozen A, of each pair the components that learn. */
import { array, copyOf } from "./arrays.mjs";

const AXES = [[".lora_A.weight", 0], [".lora_embedding_A", 0], [".lora_B.weight", 1], [".lora_embedding_B", 1]];
const axisOf = (name) => AXES.find(([end]) => name.endsWith(end))?.[1];

/** Names that `frozen` "lora-a" leaves as they are. */
export function frozenNames(names, { frozen }) {
  const known = new Set(names);
  return new Set(frozen === "lora-a" ? [...known].filter((n) => n.endsWith(".lora_A.weight") && known.has(n.replace(/\.lora_A\.weight$/, ".lora_B.weight"))) : []);
}

/** What travels of an adapter. @param {import("./arrays.mjs").Arrays} arrays @param {import("./work.mjs").Work} work */
export function trainedPart(arrays, work) {
  const frozen = frozenNames(Object.keys(arrays), work);
  return Object.fromEntries(Object.entries(arrays).filter(([name]) => !frozen.has(name)).map(([name, value]) => [name, cutTo(name, value, work.rank)]));
}

function cutTo(name, value, rank) {
  const axis = axisOf(name);
  if (!rank || axis === undefined || value.shape[axis] <= rank) return value;
  if (axis === 0) return array(value.dtype, [rank, ...value.shape.slice(1)], value.data.slice(0, (value.data.length / value.shape[0]) * rank));
  const [rows, width, ...rest] = value.shape, block = rest.reduce((a, b) => a * b, 1);
  const data = new value.data.constructor(rows * rank * block);
  for (let row = 0; row < rows; row++) data.set(value.data.subarray(row * width * block, (row * width + rank) * block), row * rank * block);
  return array(value.dtype, [rows, rank, ...rest], data);
}

/** Arrays with zeros beyond the first `rank` components of each pair. */
export function truncated(grads, rank) {
  if (!rank) return grads;
  return Object.fromEntries(Object.entries(grads).map(([name, value]) => {
    const axis = axisOf(name);
    if (axis === undefined) return [name, value];
    const kept = copyOf(value), inner = value.shape.slice(axis + 1).reduce((a, b) => a * b, 1);
    kept.data.forEach((_, i) => Math.floor(i / inner) % value.shape[axis] >= rank && (kept.data[i] = 0));
    return [name, kept];
  }));
}
