/** How tensors are packed: codecs by name, the two frames around their parts, and error feedback. */
import { array, isFinite32, sameShape, sizeOf } from "../../engine/arrays.mjs";
import { ConfigError, oneLine, some, WireError } from "../../engine/errors.mjs";
import { compareText, writeTensors } from "../../engine/safetensors.mjs";
import { pack as packed, unpack as unpacked } from "../msgpack.mjs";
import { deflated, inflated } from "./deflate.mjs";
import { innovation } from "./innovation.mjs";
import { asKind, chainOf, known, ofKind, RESIDUAL } from "./memory.mjs";
import { asFloats32, checkFinite, sorted } from "./numbers.mjs";
import { fp16, fp32, int8 } from "./plain.mjs";
import { bySign, byStale, caesar, quant, topk, xor } from "./whole.mjs";

/** @typedef {import("../../engine/arrays.mjs").Arrays} Arrays */

const tensorwise = ({ encode, decode }) => () => ({
  frame: 1,
  encode(values, reference) {
    const found = sorted(values).map((name) => [name, encode(values[name], reference[name])]);
    return { parts: Object.fromEntries(found.map(([n, { part }]) => [n, part])), conveyed: Object.fromEntries(found.map(([n, { conveyed }]) => [n, conveyed])) };
  },
  decode: (parts, reference) => Object.fromEntries(Object.entries(parts).map(([name, part]) => {
    try {
      return [name, decode(part, reference[name])];
    } catch (error) {
      throw new WireError(`${name}: ${error.message}`);
    }
  })),
});
const framed = (make) => (ratio, bits) => ({ frame: 2, ...make(ratio, bits) });

/** By name. Each has encode (values, reference, memory) and decode (parts, reference, memory); `remembers` are kinds of memory of both sides. */
export const CODECS = {
  fp32: tensorwise(fp32), fp16: tensorwise(fp16), int8: tensorwise(int8), xor: framed(xor), quant: framed(quant), innovation: framed(innovation),
  topk: (ratio, bits) => ({ frame: bits ? 2 : 1, ...topk(ratio, bits) }),
  caesar: framed(caesar("caesar", byStale)), "caesar-sign": framed(caesar("caesar-sign", bySign)), "caesar-zero": framed(caesar("caesar-zero", null)),
};

/** @returns ConfigError for one that is not here */
export function makeCodec(name, ratio = 0, bits = 0) {
  if (!Object.hasOwn(CODECS, name)) throw new ConfigError(`no codec ${oneLine(name)} here; have: ${Object.keys(CODECS).join(", ")}`);
  return { name, ...CODECS[name](ratio, bits) };
}

/**
 * Pack tensors for a receiver that holds `reference`, adding what earlier payloads could not convey.
 * @param {ReturnType<makeCodec>} codec
 * @param {Arrays} values any subset of the reference's tensors
 * @param {Arrays} reference
 * @param {{memory?: Arrays, referenceSha256?: string}} [more] `memory`: as this returned it last time; of kinds that the codec does not know it is dropped
 * @returns {{payload: Uint8Array, conveyed: Arrays, memory: Arrays}}
 */
export function packUpdate(codec, values, reference, { memory = {}, referenceSha256 = "" } = {}) {
  checkTensors(values, reference);
  const residual = ofKind(RESIDUAL, memory), before = known(memory, codec.remembers ?? []);
  const owed = Object.fromEntries(Object.entries(values).map(([name, value]) => [name, residual[name] ? added(value, residual[name]) : value]));
  const wanted = asFloats32(owed);
  checkTensors(wanted, reference);
  const { parts, conveyed, memory: kept = {} } = codec.encode(wanted, reference, before), left = {};
  for (const [name, value] of Object.entries(residual)) if (!values[name]) left[name] = value;
  for (const [name, { shape, data }] of Object.entries(owed)) {
    const rest = Float64Array.from(data, (x, i) => x - conveyed[name].data[i]);
    if (rest.some((x) => x !== 0)) left[name] = array("float64", shape, rest);
  }
  return { payload: write(codec, parts, wanted, referenceSha256, chainOf(before)), conveyed, memory: { ...kept, ...asKind(RESIDUAL, left) } };
}

const added = ({ shape, data }, rest) => array("float64", shape, Float64Array.from(data, (x, i) => x + rest.data[i]));

/** Unpack what a sender packed. @param {Uint8Array} payload @returns {Arrays} a subset of the reference's, all finite */
export const unpackUpdate = (codec, payload, reference) => unpackWith(codec, payload, reference, {}).values;

/**
 * The same with a receiver's memory.
 * @param {Arrays} memory as this returned it last time
 * @returns {{values: Arrays, memory: Arrays}}
 */
export function unpackWith(codec, payload, reference, memory) {
  const most = bytesMax(reference);
  if (payload.length > most) throw new WireError(`update of ${payload.length} bytes; these tensors take at most ${most}`);
  const update = unpacked(payload), get = (name) => (update instanceof Map ? update.get(name) : undefined);
  if (get("codec") !== codec.name) throw new WireError(`update in codec ${oneLine(String(get("codec")), 40)}; expected ${codec.name}`);
  if (get("v") !== codec.frame) throw new WireError(`update in frame ${oneLine(String(get("v")), 20)}; expected ${codec.frame}`);
  const { parts, shapes } = codec.frame === 1 ? readByTensor(get("tensors")) : readByKind(get("table"), get("parts"), most);
  checkShapes(shapes, reference);
  const held = Object.fromEntries([...shapes.keys()].sort(compareText).map((name) => [name, reference[name]]));
  const found = codec.decode(parts, held, meant(get("memory"), codec, memory)), { values, memory: kept } = codec.remembers ? found : { values: found, memory: {} };
  checkFinite(values);
  return { values, memory: kept };
}

/** The memory that a payload is encoded with, if it is the one at hand. */
function meant(named, codec, memory) {
  if (!codec.remembers || (named ?? "") === chainOf(memory)) return memory;
  if (named) throw new WireError(`update encoded with memory ${oneLine(String(named), 12)}, which is not the one kept here`);
  return {};
}

/** The adapter file that a difference from `held` means; its bytes are the sender's. @returns {Uint8Array} */
export const applyDelta = (codec, payload, held) => writeTensors({ ...held, ...asFloats32(unpackUpdate(codec, payload, held)) });

/** What to accept at most. @param {Arrays} reference */
export const bytesMax = (reference) =>
  1024 + Object.entries(reference).reduce((sum, [name, { shape }]) => sum + 256 + 2 * name.length + 10 * sizeOf(shape), 0);

function write(codec, parts, values, reference, chain) {
  const names = sorted(values), more = [["reference", reference], ["memory", chain]].filter(([, said]) => said);
  if (codec.frame === 1) {
    const tensors = names.map((name) => new Map([["name", name], ["shape", values[name].shape], ["data", parts[name]]]));
    return packed(new Map([["v", 1], ["codec", codec.name], ["tensors", tensors], ...more]));
  }
  const table = packed(names.map((name) => [name, values[name].shape])), section = (bytes) => [bytes.length, deflated(bytes)];
  const kinds = Object.keys(parts).filter((kind) => parts[kind].length).sort(compareText);
  const sections = new Map(kinds.map((kind) => [kind, section(parts[kind])]));
  return packed(new Map([["v", 2], ["codec", codec.name], ["table", section(table)], ["parts", sections], ...more]));
}

const malformed = (what) => new WireError(`malformed update: ${what}`);
const isShape = (shape) => Array.isArray(shape) && shape.every((n) => Number.isSafeInteger(n) && n >= 0);

function readByTensor(tensors) {
  if (!Array.isArray(tensors)) throw malformed("no tensors");
  const parts = {}, shapes = new Map();
  for (const tensor of tensors) {
    const [name, shape, data] = tensor instanceof Map ? ["name", "shape", "data"].map((key) => tensor.get(key)) : [];
    if (typeof name !== "string" || !isShape(shape) || !(data instanceof Uint8Array)) throw malformed("a tensor without name, shape and data");
    if (shapes.has(name)) throw new WireError("update does not fit: a tensor comes twice");
    shapes.set(name, shape);
    parts[name] = data;
  }
  return { parts, shapes };
}

function readByKind(table, parts, most) {
  if (!(parts instanceof Map) || parts.size > 16) throw malformed("no parts, or too many");
  const all = new Map([["table", table], ...parts]);
  for (const [kind, section] of all)
    if (!Array.isArray(section) || section.length !== 2 || !isShape(section.slice(0, 1)) || !(section[1] instanceof Uint8Array)) throw malformed(`part ${oneLine(kind, 40)}`);
  const sum = [...all.values()].reduce((total, [size]) => total + size, 0);
  if (sum > most) throw new WireError(`update inflates to ${sum} bytes; these tensors take at most ${most}`);
  const open = (kind, [size, data]) => (data.length === size ? data : inflated(data, size, kind));
  const rows = unpacked(open("table", table));
  if (!Array.isArray(rows) || !rows.every((row) => Array.isArray(row) && row.length === 2 && typeof row[0] === "string" && isShape(row[1]))) throw malformed("its table");
  if (rows.some(([name], i) => i && compareText(rows[i - 1][0], name) >= 0)) throw new WireError("update does not fit: a tensor comes twice, or out of order");
  return { parts: Object.fromEntries([...parts].map(([kind, section]) => [kind, open(kind, section)])), shapes: new Map(rows) };
}

function checkShapes(shapes, reference) {
  const problems = [];
  for (const [name, shape] of shapes) {
    if (!Object.hasOwn(reference, name)) problems.push(`${oneLine(name, 80)}: unknown tensor`);
    else if (!sameShape(shape, reference[name].shape)) problems.push(`${name}: shape [${shape.slice(0, 8)}], expected [${reference[name].shape}]`);
  }
  if (problems.length) throw new WireError(`update does not fit: ${some(problems)}`);
}

function checkTensors(values, reference) {
  for (const [name, value] of Object.entries(values)) {
    if (!reference[name]) throw new WireError(`cannot pack: ${name}: not in the reference`);
    if (!sameShape(value.shape, reference[name].shape)) throw new WireError(`cannot pack: ${name}: shape [${value.shape}], the reference has [${reference[name].shape}]`);
    if (!isFinite32(value) || !isFinite32(reference[name])) throw new WireError(`cannot pack: ${name}: not finite`);
  }
}
