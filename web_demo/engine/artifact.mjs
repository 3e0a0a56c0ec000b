/** An artifact, opened: every file is checked by size and SHA-256 before anything of it is used. */
import { isFinite32, sameShape, viewOf } from "./arrays.mjs";
import { ArtifactError, FleetuneError, oneLine, some, TransportError } from "./errors.mjs";
import { parseManifest, trainable } from "./manifest.mjs";
import { asFloats, readTensors } from "./safetensors.mjs";
import { digestOf } from "./sha256.mjs";

const BASE = "base.safetensors";
const MANIFEST_BYTES_MAX = 64 * 2 ** 20;

/** @callback ReadFile @param {string} name @returns {Promise<Uint8Array>} throws where there is no such file */

export class Artifact {
  /**
   * @param {import("./manifest.mjs").Manifest} manifest
   * @param {string} digest SHA-256 of manifest.json, which fixes every other file
   * @param {Map<string, Uint8Array>} files
   */
  constructor(manifest, digest, files) {
    this.manifest = manifest;
    this.digest = digest;
    this.files = files;
  }

  /** Bytes of a listed file. */
  file(name) {
    const found = this.files.get(name);
    if (!found) throw new ArtifactError(`${name} is not in the artifact`);
    return found;
  }

  /** The frozen tensor as a view of its file; no byte is copied. @param {import("./manifest.mjs").Row} row */
  base(row) {
    return viewOf(this.file(BASE), row.dtype, row.shape, row.offset);
  }

  /** Have the frozen tensors lie where `adopt` puts their bytes; views that were given out before are void. */
  moveBase(adopt) {
    const bytes = this.file(BASE), moved = adopt(bytes);
    if (moved === bytes) return;
    this.files.set(BASE, moved);
    release(bytes);
  }

  /** Version 0 of the trainable tensors, float32 by name. */
  adapter() {
    return fitAdapter(this.manifest, readTensors(this.file("adapter.safetensors")).arrays);
  }
}

/**
 * Open an artifact.
 * @param {ReadFile} read
 * @param {{where?: string, onBytes?: (done: number, all: number) => void, also?: string[]}} [options] `also`: listed files to load
 *   though no graph needs them
 * @returns {Promise<Artifact>}
 */
export async function openArtifact(read, { where = "artifact", onBytes = () => {}, also = [] } = {}) {
  const content = await read("manifest.json").catch((error) => {
    if (error instanceof FleetuneError) throw error;
    throw new ArtifactError(`${where}: no artifact here (no manifest.json): ${oneLine(error.message)}; make one with fleetune export`);
  });
  if (content.length > MANIFEST_BYTES_MAX) throw new ArtifactError(`${where}: manifest.json is larger than ${MANIFEST_BYTES_MAX} bytes`);
  const manifest = parseManifest(content, `${where}/manifest.json`), files = new Map();
  const names = neededFiles(manifest, also);
  const all = names.reduce((sum, name) => sum + manifest.files[name].size_bytes, 0), problems = [];
  let done = 0;
  for (const name of names) {
    const { bytes, problem } = await checked(read, name, manifest.files[name]);
    if (problem) problems.push(problem);
    else files.set(name, bytes);
    done += manifest.files[name].size_bytes;
    onBytes(done, all);
  }
  if (problems.length) throw new ArtifactError(`${where}: ${some(problems)}; copy or export it again`);
  return new Artifact(manifest, await digestOf(content), files);
}

/** A port without another end: what is sent there is gone at once. */
const NOWHERE = closedPort();

function closedPort() {
  const { port1, port2 } = new MessageChannel();
  port2.close();
  return port1;
}

/** Give the memory of bytes back now: what is as large as a model is not left to a collection of garbage that may come late. */
const release = ({ buffer }) => NOWHERE.postMessage(null, [buffer]);

function neededFiles(manifest, also) {
  const graphs = [manifest.prelude, manifest.head, ...manifest.kinds].flatMap((part) => Object.values(part.graphs).map((g) => g.file));
  const own = manifest.tokenizer ? [manifest.tokenizer.file] : [];
  return [...new Set([BASE, "adapter.safetensors", ...graphs, ...own, ...also.filter((name) => manifest.files[name])])];
}

async function checked(read, name, { size_bytes, sha256 }) {
  let bytes;
  try {
    bytes = await read(name);
  } catch (error) {
    if (error instanceof TransportError && !error.status) throw error; // nobody answers: the artifact is not at fault
    return { problem: `${name} is missing (${oneLine(error.message, 80)})` };
  }
  if (bytes.length !== size_bytes) return { problem: `${name}: ${bytes.length} bytes, expected ${size_bytes} (truncated?)` };
  if ((await digestOf(bytes)) !== sha256) return { problem: `${name}: SHA-256 differs from the manifest (tampered with, or a bad copy)` };
  return { bytes };
}

/**
 * Arrays of any float dtype as exactly the trainable tensors, float32; every difference is listed.
 * @returns {import("./arrays.mjs").Arrays}
 */
export function fitAdapter(manifest, arrays) {
  const wanted = new Map(trainable(manifest).map((row) => [row.name, row])), problems = [];
  for (const name of Object.keys(arrays).sort()) if (!wanted.has(name)) problems.push(`${oneLine(name)}: not in the artifact`);
  const fitted = {};
  for (const [name, row] of wanted) {
    if (!Object.hasOwn(arrays, name)) problems.push(`${name}: missing`);
    else if (!sameShape(arrays[name].shape, row.shape)) problems.push(`${name}: expected [${row.shape}], got [${arrays[name].shape}]`);
    else if (!isFinite32((fitted[name] = asFloats(arrays[name])))) problems.push(`${name}: holds NaN or infinity`);
  }
  if (problems.length) throw new ArtifactError(`adapter does not fit: ${some(problems)}`);
  return fitted;
}
