/**
 * Graph inputs as initializers of their graph: onnxruntime's JavaScript copies every input of a run into its heap, so an embedding
 * table as an input costs its size at each step. An initializer is copied once.
 *
 * Protobuf merges a second `graph` field into the first, so nothing of the file is read: a field is put behind it. The input of
 * the same name keeps its place and becomes optional.
 */
import { bytesOf } from "./arrays.mjs";

const ONNX_TYPES = { float32: 1, uint8: 2, int8: 3, int16: 5, int32: 6, int64: 7, bool: 9, float16: 10, float64: 11, uint64: 13 };

/**
 * @param {Uint8Array} model an ONNX file
 * @param {import("./arrays.mjs").Arrays} weights by the names of inputs
 * @returns {Uint8Array}
 */
export function withInitializers(model, weights) {
  const tensors = Object.entries(weights).map(([name, { dtype, shape, data }]) => {
    const dims = shape.map((extent) => [...key(1, 0), ...varint(extent)]).flat();
    const text = new TextEncoder().encode(name);
    const head = Uint8Array.from([...dims, ...key(2, 0), ...varint(ONNX_TYPES[dtype]), ...key(8, 2), ...varint(text.length), ...text,
      ...key(9, 2), ...varint(data.byteLength)]);
    return [head, bytesOf({ data })];
  });
  const fields = tensors.map(([head, raw]) => [Uint8Array.from([...key(5, 2), ...varint(head.length + raw.length)]), head, raw]).flat();
  const size = fields.reduce((sum, piece) => sum + piece.length, 0);
  const lead = Uint8Array.from([...key(7, 2), ...varint(size)]);
  const whole = new Uint8Array(model.length + lead.length + size);
  let place = 0;
  for (const piece of [model, lead, ...fields]) {
    whole.set(piece, place);
    place += piece.length;
  }
  return whole;
}

const key = (field, type) => varint(field * 8 + type);

function varint(value) {
  const found = [];
  for (; value >= 128; value = Math.floor(value / 128)) found.push((value % 128) | 128);
  return [...found, value];
}
