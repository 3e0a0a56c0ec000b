/** What an artifact says of itself: `manifest.json`, read with the refusals of Python's `contracts/manifest` and `soundness`. */
import { sizeOf, TYPES } from "./arrays.mjs";
import { ArtifactError, oneLine, some } from "./errors.mjs";

export const FORMAT = 2;
const ROLES = ["batch", "hidden", "side", "weight", "saved", "d_hidden", "d_weight", "loss", "logits"];
const ELEMENTS_MAX = 2 ** 48;

/**
 * @typedef {{name: string, role: string, dtype: string, shape: (number|string)[], index: number}} Port
 * @typedef {{file: string, inputs: Port[], outputs: Port[]}} Graph
 * @typedef {{name: string, file: "base"|"adapter", dtype: string, shape: number[], offset: number, layer: number, trainable: boolean}} Row
 * @typedef {{shift: number, ignored: number}} Targets
 * @typedef {{graphs: Record<string, Graph>, tensors: number[], targets: Targets|null, counted: Targets|string}} Section
 * @typedef {{kind: number, tensors: number[], sides: number[]}} Layer
 * @typedef {{name: string, dtype: string, shape: (number|string)[], pad: number, role: string, below: number}} Input
 * @typedef {Object} Manifest
 * @property {string} name
 * @property {string} task
 * @property {string[]} labels
 * @property {Input[]} inputs
 * @property {Section} prelude
 * @property {{graphs: Record<string, Graph>}[]} kinds
 * @property {Layer[]} layers
 * @property {Section} head
 * @property {Row[]} tensors
 * @property {Record<string, {sha256: string, size_bytes: number}>} files
 * @property {string} base_dtype
 * @property {{file: string, pad_id: number, max_length: number, truncation_side: string}|null} tokenizer
 * @property {Record<string, number>} bounds
 */

/**
 * Bytes of `manifest.json` to a manifest with its defaults filled in.
 * @param {Uint8Array} content
 * @param {string} where for messages
 * @returns {Manifest}
 */
export function parseManifest(content, where) {
  let found;
  try {
    found = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
  } catch (error) {
    throw new ArtifactError(`${where}: not a manifest: ${oneLine(error.message)}`);
  }
  if (!Number.isInteger(found?.format)) throw new ArtifactError(`${where}: not a manifest: no format`);
  if (found.format > FORMAT)
    throw new ArtifactError(`${where}: format ${found.format} is newer than ${FORMAT}, which this version reads; update fleetune`);
  if (found.format < FORMAT)
    throw new ArtifactError(`${where}: format ${found.format} is older than ${FORMAT}, which this version reads; export again`);
  const manifest = { base_dtype: "fp32", tokenizer: null, bounds: {}, ...found };
  let problems;
  try {
    fillIn(manifest);
    problems = [...pathProblems(manifest), ...tableProblems(manifest)];
  } catch (error) {
    if (error instanceof ArtifactError) throw error;
    throw new ArtifactError(`${where}: not a manifest: ${oneLine(error.message)}`);
  }
  if (problems.length) throw new ArtifactError(`${where}: ${some(problems)}`);
  return manifest;
}

/** The tensors of the adapter, in table order. @param {Manifest} manifest */
export const trainable = (manifest) => manifest.tensors.filter((row) => row.trainable);

/** Place of the labels among the inputs. @param {Manifest} manifest */
export const labelIndex = (manifest) => manifest.inputs.findIndex((row) => row.role === "labels");

/** The inputs that are no labels. @param {Manifest} manifest */
export const features = (manifest) => manifest.inputs.filter((row) => row.role !== "labels");

/** Which labels a mean loss is taken over; null where it is one over rows. @returns {Targets|null} */
export const countedOf = (manifest) => (manifest.head.counted === "rows" ? null : manifest.head.counted);

/** The layers that have something to train. @returns {Set<number>} */
export const learning = (manifest) =>
  new Set(manifest.layers.flatMap((layer, i) => (layer.tensors.some((t) => manifest.tensors[t].trainable) ? [i] : [])));

export const isLoraB = (name) => name.includes(".lora_B") || name.includes(".lora_embedding_B");

function fillIn(manifest) {
  const port = (row) => ({ index: 0, ...row });
  const graphs = (part) => {
    for (const graph of Object.values(part.graphs)) {
      graph.inputs = graph.inputs.map(port);
      graph.outputs = graph.outputs.map(port);
    }
  };
  for (const name of ["prelude", "head"]) manifest[name] = { tensors: [], targets: null, counted: "", ...manifest[name] };
  [manifest.prelude, manifest.head, ...manifest.kinds].forEach(graphs);
  manifest.layers = manifest.layers.map((layer) => ({ sides: [], ...layer }));
  manifest.tensors = manifest.tensors.map((row) => ({ layer: -1, trainable: false, ...row }));
  manifest.inputs = manifest.inputs.map((row) => ({ pad: 0, role: "", below: 0, ...row }));
  // Manifests did not always say what their loss is a mean over.
  if (!manifest.head.counted) manifest.head.counted = { shift: manifest.task === "causal-lm" ? 1 : 0, ignored: -100 };
}

function* pathProblems(manifest) {
  for (const name of Object.keys(manifest.files))
    if (!name || name.startsWith("/") || name.includes("\\") || name.includes("\0") || name.split("/").includes(".."))
      yield `path ${JSON.stringify(name)} leads outside the folder`;
  for (const needed of ["base.safetensors", "adapter.safetensors"])
    if (!Object.hasOwn(manifest.files, needed)) yield `${needed} is not listed`;
  const used = [manifest.prelude, manifest.head, ...manifest.kinds].flatMap((part) => Object.values(part.graphs).map((g) => g.file));
  if (manifest.tokenizer) used.push(manifest.tokenizer.file);
  for (const name of new Set(used)) if (!Object.hasOwn(manifest.files, name)) yield `${JSON.stringify(name)} is used but has no digest`;
}

function* tableProblems(manifest) {
  if (manifest.backend !== "onnx") yield `backend ${JSON.stringify(manifest.backend)}: a page runs artifacts of backend "onnx"`;
  if (manifest.inputs.filter((row) => row.role === "labels").length !== 1) yield "inputs: expected one whose role is labels";
  if (manifest.inputs.every((row) => row.shape[0] !== "batch")) yield "inputs: none has a row for each sample";
  for (const row of manifest.inputs) if (!TYPES[row.dtype]) yield `input ${row.name}: no dtype ${row.dtype}`;
  const baseBytes = manifest.files["base.safetensors"]?.size_bytes ?? 0;
  for (const row of manifest.tensors) yield* rowProblems(row, baseBytes);
  const count = manifest.tensors.length, outside = (i) => !Number.isInteger(i) || i < 0 || i >= count;
  const slots = [["prelude", manifest.prelude], ["head", manifest.head], ...manifest.layers.map((layer, i) => [`layer ${i}`, layer])];
  for (const [where, { tensors }] of slots) if (tensors.some(outside)) yield `${where}: a tensor index outside the table of ${count}`;
  yield* layerProblems(manifest);
  const parts = [["prelude", manifest.prelude], ["head", manifest.head], ...manifest.kinds.map((kind, i) => [`kind ${i}`, kind])];
  for (const [where, part] of parts) yield* graphProblems(where, part, manifest.inputs.length);
}

function* rowProblems(row, baseBytes) {
  if (!TYPES[row.dtype]) yield `${row.name}: no dtype ${row.dtype}`;
  else if (![...row.shape, row.offset].every((n) => Number.isSafeInteger(n) && n >= 0)) yield `${row.name}: negative shape or offset`;
  else if (sizeOf(row.shape) > ELEMENTS_MAX || (row.file === "base" && row.offset + sizeOf(row.shape) * TYPES[row.dtype].BYTES_PER_ELEMENT > baseBytes))
    yield `${row.name}: ends beyond base.safetensors (${baseBytes} bytes)`;
}

function* layerProblems(manifest) {
  const given = new Set(ports(manifest.prelude, "outputs").filter((p) => p.role === "side").map((p) => p.index));
  for (const [i, layer] of manifest.layers.entries()) {
    const kind = manifest.kinds[layer.kind];
    if (!kind) {
      yield `layer ${i}: kind ${layer.kind} of ${manifest.kinds.length}`;
      continue;
    }
    const weights = slotsUsed(kind, ["weight", "d_weight"]), sides = slotsUsed(kind, ["side"]);
    if (weights > layer.tensors.length) yield `layer ${i}: ${layer.tensors.length} tensors, its graphs take ${weights}`;
    if (sides > layer.sides.length) yield `layer ${i}: ${layer.sides.length} sides, its graphs take ${sides}`;
    for (const side of layer.sides.slice(0, sides)) if (!given.has(side)) yield `layer ${i}: no side ${side} comes out of the prelude`;
  }
}

function* graphProblems(where, part, numInputs) {
  if (part.tensors && slotsUsed(part, ["weight", "d_weight"]) > part.tensors.length)
    yield `${where}: ${part.tensors.length} tensors, its graphs take ${slotsUsed(part, ["weight", "d_weight"])}`;
  if (where !== "head" && !part.graphs.forward) yield `${where}: no forward graph`;
  for (const port of [...ports(part, "inputs"), ...ports(part, "outputs")]) {
    if (!ROLES.includes(port.role)) yield `${where}: no role ${oneLine(port.role)}`;
    if (!TYPES[port.dtype]) yield `${port.name}: no dtype ${port.dtype}`;
    if (!(port.index >= 0) || (port.role === "batch" && port.index >= numInputs)) yield `${port.name}: index ${port.index} leads nowhere`;
  }
}

const ports = (part, way) => Object.values(part.graphs).flatMap((graph) => graph[way]);
const slotsUsed = (part, roles) =>
  Math.max(0, ...[...ports(part, "inputs"), ...ports(part, "outputs")].filter((p) => roles.includes(p.role)).map((p) => p.index + 1));
