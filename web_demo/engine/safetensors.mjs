/** safetensors files: read as views, written as the `safetensors` library writes them, byte for byte. */
import { array, bytesOf, sizeOf, TYPES, viewOf, widened } from "./arrays.mjs";
import { ArtifactError, oneLine } from "./errors.mjs";

const DTYPES = {
  BOOL: "bool", I8: "int8", U8: "uint8", I16: "int16", I32: "int32", I64: "int64", U64: "uint64", F16: "float16",
  F32: "float32", F64: "float64",
};
const NAMES = Object.fromEntries(Object.entries(DTYPES).map(([name, dtype]) => [dtype, name]));
/** The order in which the library lays tensors out: largest elements first, then by name. */
const RANK = ["bool", "uint8", "int8", "int16", "float16", "int32", "float32", "float64", "int64", "uint64"];

/**
 * @param {Uint8Array} content
 * @returns {{arrays: import("./arrays.mjs").Arrays, metadata: Record<string, string>}} views of `content`
 */
export function readTensors(content) {
  const { rows, metadata, start } = readHeader(content);
  const arrays = {};
  for (const [name, row] of Object.entries(rows)) {
    const [first, end] = row.data_offsets;
    const dtype = DTYPES[row.dtype];
    if (!dtype) throw new ArtifactError(`not a safetensors file that is read here: ${oneLine(name)} is ${oneLine(row.dtype)}`);
    if (end - first !== sizeOf(row.shape) * TYPES[dtype].BYTES_PER_ELEMENT)
      throw new ArtifactError(`not a safetensors file: ${oneLine(name)} of ${row.shape} in ${end - first} bytes`);
    arrays[name] = viewOf(content, dtype, row.shape, start + first);
  }
  return { arrays, metadata };
}

/** Float32 of whatever float was saved. @returns {import("./arrays.mjs").NDArray} */
export function asFloats({ dtype, shape, data }) {
  if (dtype === "float32") return array(dtype, shape, data);
  if (dtype === "float16") return array("float32", shape, widened(data));
  if (dtype === "float64") return array("float32", shape, Float32Array.from(data));
  throw new ArtifactError(`${dtype} where a float was expected`);
}

function readHeader(content) {
  if (content.length < 8) throw new ArtifactError(`not a safetensors file: ${content.length} bytes`);
  const size = new DataView(content.buffer, content.byteOffset, 8).getBigUint64(0, true);
  if (size > BigInt(content.length - 8))
    throw new ArtifactError(`not a safetensors file: a header of ${size} bytes in ${content.length}`);
  const start = 8 + Number(size);
  try {
    const { __metadata__: metadata = {}, ...rows } = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content.subarray(8, start)));
    for (const [name, row] of Object.entries(rows)) if (!isRow(row)) throw new Error(`row ${name}`);
    return { rows, metadata, start };
  } catch (error) {
    throw new ArtifactError(`not a safetensors file: ${oneLine(error.message)}`);
  }
}

const isCount = (n) => Number.isSafeInteger(n) && n >= 0;
const isRow = (row) =>
  typeof row.dtype === "string" && Array.isArray(row.shape) && row.shape.every(isCount) && Array.isArray(row.data_offsets) &&
  row.data_offsets.length === 2 && row.data_offsets.every(isCount) && row.data_offsets[0] <= row.data_offsets[1];

/**
 * @param {import("./arrays.mjs").Arrays} arrays
 * @param {Record<string, string>} [metadata]
 * @returns {Uint8Array} equal arrays give equal bytes, those of Python's `arrays.to_bytes`
 */
export function writeTensors(arrays, metadata) {
  const order = Object.keys(arrays).sort(
    (a, b) => RANK.indexOf(arrays[b].dtype) - RANK.indexOf(arrays[a].dtype) || compareText(a, b),
  );
  let end = 0;
  const entries = metadata ? [["__metadata__", metadata]] : [];
  for (const name of order) {
    const { dtype, shape, data } = arrays[name], first = end;
    end += data.byteLength;
    entries.push([name, { dtype: NAMES[dtype], shape, data_offsets: [first, end] }]);
  }
  const header = new TextEncoder().encode(`{${entries.map(([name, row]) => `${JSON.stringify(name)}:${JSON.stringify(row)}`).join(",")}}`);
  const size = Math.ceil(header.length / 8) * 8, content = new Uint8Array(8 + size + end);
  new DataView(content.buffer).setBigUint64(0, BigInt(size), true);
  content.fill(32, 8, 8 + size).set(header, 8);
  let place = 8 + size;
  for (const name of order) {
    content.set(bytesOf(arrays[name]), place);
    place += arrays[name].data.byteLength;
  }
  return content;
}

/** By code points, as Python and Rust sort. */
export function compareText(a, b) {
  const left = [...a], right = [...b];
  for (let i = 0; i < Math.min(left.length, right.length); i++)
    if (left[i] !== right[i]) return left[i].codePointAt(0) - right[i].codePointAt(0);
  return left.length - right.length;
}
