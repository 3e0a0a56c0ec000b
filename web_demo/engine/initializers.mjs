/**
 * Graph inputs as initializers of their graph: onnxruntime's JavaScript copies every input of a run into its heap, so an embedding
 * table as an input costs its size at each step. An initializer is copied once.
 *
 * Protobuf merges a second `graph` field into the first, so nothing of the file is read: a field is put behind it. The input of
 * the same name keeps its place and becomes optional. The values stay where they are, as external data: within the model they
 * would be in the heap three times while it is opened, and a heap never shrinks.
 */
import { bytesOf } from "./arrays.mjs";

/** Numbers of dtypes in ONNX. */
export const ONNX_TYPES = { float32: 1, uint8: 2, int8: 3, int16: 5, int32: 6, int64: 7, bool: 9, float16: 10, float64: 11, uint64: 13 };
const EXTERNAL = 1;

/**
 * @param {Uint8Array} model an ONNX file
 * @param {import("./arrays.mjs").Arrays} weights by the names of inputs
 * @returns {{model: Uint8Array, externalData: {path: string, data: Uint8Array}[]}} as a session takes them
 */
export function withInitializers(model, weights) {
  const externalData = Object.values(weights).map((value, i) => ({ path: `weight-${i}`, data: bytesOf(value) }));
  const tensors = Object.entries(weights).map(([name, { dtype, shape }], i) => {
    const { path, data } = externalData[i], entry = (key, value) => field(13, [...text(1, key), ...text(2, value)]);
    return field(5, [
      ...shape.flatMap((extent) => [...tag(1, 0), ...varint(extent)]), ...tag(2, 0), ...varint(ONNX_TYPES[dtype]), ...text(8, name),
      ...entry("location", path), ...entry("offset", "0"), ...entry("length", String(data.length)), ...tag(14, 0), EXTERNAL,
    ]);
  });
  const graph = Uint8Array.from(field(7, tensors.flat())), whole = new Uint8Array(model.length + graph.length);
  whole.set(model);
  whole.set(graph, model.length);
  return { model: whole, externalData };
}

const tag = (number, type) => varint(number * 8 + type);
const field = (number, bytes) => [...tag(number, 2), ...varint(bytes.length), ...bytes];
const text = (number, value) => field(number, [...new TextEncoder().encode(value)]);

function varint(value) {
  const found = [];
  for (; value >= 128; value = Math.floor(value / 128)) found.push((value % 128) | 128);
  return [...found, value];
}
