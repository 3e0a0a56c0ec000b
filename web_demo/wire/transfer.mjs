/** Transfers: content in chunks, pulled by bitmap, so that it survives any loss and resumes after any reconnection. */
import { WireError } from "../engine/errors.mjs";
import { hex, sha256 } from "../engine/sha256.mjs";
import { CHUNK_BYTES, TRANSFER_BYTES_MAX } from "./messages.mjs";

const DIGEST_BYTES = 8, NUM_CHUNKS_MAX = 8192, REQUEST_CHUNKS_MAX = 32;
const chunksOf = ({ size_bytes, chunk_bytes }) => Math.ceil(size_bytes / chunk_bytes);
const bitmapBytes = (count) => Math.ceil(count / 8);

/** Content that others pull; `manifest` announces it. */
export class Outgoing {
  /** @param {Uint8Array} content kept, not copied */
  constructor(content, chunkBytes = CHUNK_BYTES) {
    const count = Math.ceil(content.length / chunkBytes), digests = new Uint8Array(DIGEST_BYTES * count);
    if (count > NUM_CHUNKS_MAX) throw new WireError(`${content.length} bytes are ${count} chunks; at most ${NUM_CHUNKS_MAX} are sent`);
    this.content = content;
    for (let i = 0; i < count; i++)
      digests.set(sha256(content.subarray(i * chunkBytes, (i + 1) * chunkBytes)).subarray(0, DIGEST_BYTES), DIGEST_BYTES * i);
    this.manifest = { size_bytes: content.length, chunk_bytes: chunkBytes, chunk_digests: digests, sha256: hex(sha256(content)) };
  }

  /** Whether a request is for as many chunks as there are: they may have become smaller since. */
  isOf = (request) => request.missing.length === bitmapBytes(chunksOf(this.manifest));

  /** The chunks asked for, lowest first. @returns {{type: "chunk", sha256: string, index: number, data: Uint8Array}[]} */
  chunks(request) {
    const { sha256: digest, chunk_bytes } = this.manifest, count = chunksOf(this.manifest), found = [];
    if (request.sha256 !== digest) throw new WireError(`request for transfer ${request.sha256}; expected ${digest}`);
    if (!this.isOf(request)) throw new WireError(`bitmap of ${request.missing.length} bytes, expected ${bitmapBytes(count)}`);
    const most = Math.min(request.limit, REQUEST_CHUNKS_MAX);
    for (let i = 0; i < count && found.length < most; i++)
      if (request.missing[i >> 3] & (1 << (i & 7)))
        found.push({ type: "chunk", sha256: digest, index: i, data: this.content.subarray(i * chunk_bytes, (i + 1) * chunk_bytes) });
    return found;
  }
}

/** Content that comes in chunks. */
export class Incoming {
  /** WireError before anything is allocated: larger than may be, or inconsistent in itself. */
  constructor(manifest, sizeBytesMax) {
    const problems = [...manifestProblems(manifest, Math.min(sizeBytesMax, TRANSFER_BYTES_MAX))];
    if (problems.length) throw new WireError(`transfer refused: ${problems.join("; ")}`);
    this.manifest = manifest;
    this.pieces = new Map();
    this.count = chunksOf(manifest);
  }

  get done() {
    return this.pieces.size === this.count;
  }

  /** Store a chunk; false if it was here already, WireError for a wrong one. */
  add(chunk) {
    const { manifest, count } = this, { index, data } = chunk;
    if (chunk.sha256 !== manifest.sha256) throw new WireError(`chunk of transfer ${chunk.sha256}; expected ${manifest.sha256}`);
    if (!(index >= 0 && index < count)) throw new WireError(`chunk ${index} of ${count}`);
    const size = Math.min(manifest.chunk_bytes, manifest.size_bytes - index * manifest.chunk_bytes);
    if (data.length !== size) throw new WireError(`chunk ${index}: ${data.length} bytes, expected ${size}`);
    if (!this.#isRight(index, data)) throw new WireError(`chunk ${index}: its digest differs`);
    const isNew = !this.pieces.has(index);
    this.pieces.set(index, data.slice());
    return isNew;
  }

  /** Take what has come of the same content in chunks of another size, as far as it makes whole chunks. */
  takeOver(other) {
    if (other.manifest.sha256 !== this.manifest.sha256) return;
    const own = this.manifest.chunk_bytes, step = other.manifest.chunk_bytes;
    for (let index = 0; index < this.count; index++) {
      const start = index * own, end = Math.min(start + own, this.manifest.size_bytes), data = new Uint8Array(end - start);
      let isWhole = true;
      for (let i = Math.floor(start / step); i * step < end; i++) {
        const piece = other.pieces.get(i);
        if (!piece) isWhole = false;
        else {
          const from = Math.max(start, i * step), to = Math.min(end, i * step + piece.length);
          data.set(piece.subarray(from - i * step, to - i * step), from - start);
        }
      }
      if (isWhole && this.#isRight(index, data)) this.pieces.set(index, data);
    }
  }

  missing() {
    return Array.from({ length: this.count }, (_, i) => i).filter((i) => !this.pieces.has(i));
  }

  /** Ask for chunks; null for none. */
  request(indices, limit = indices.length) {
    if (!indices.length) return null;
    const missing = new Uint8Array(bitmapBytes(this.count));
    for (const i of indices) missing[i >> 3] |= 1 << (i & 7);
    return { type: "request", sha256: this.manifest.sha256, missing, limit };
  }

  /** The whole; WireError if chunks are missing, or it is not what its SHA-256 says: then every chunk is forgotten. */
  content() {
    if (!this.done) throw new WireError(`${this.count - this.pieces.size} of ${this.count} chunks are missing`);
    const whole = new Uint8Array(this.manifest.size_bytes);
    for (const [i, piece] of this.pieces) whole.set(piece, i * this.manifest.chunk_bytes);
    if (hex(sha256(whole)) === this.manifest.sha256) return whole;
    this.pieces.clear();
    throw new WireError(`transfer ${this.manifest.sha256}: SHA-256 of the whole differs`);
  }

  #isRight(index, data) {
    const wanted = this.manifest.chunk_digests.subarray(index * DIGEST_BYTES, (index + 1) * DIGEST_BYTES), found = sha256(data);
    return wanted.every((byte, i) => byte === found[i]);
  }
}

function* manifestProblems(manifest, most) {
  if (!(manifest.size_bytes >= 0 && manifest.size_bytes <= most)) yield `${manifest.size_bytes} bytes; expected 0 to ${most}`;
  if (!/^[0-9a-f]{64}$/.test(manifest.sha256)) yield "its sha256 is not 64 hexadecimal digits";
  if (!(manifest.chunk_bytes >= 1 && manifest.chunk_bytes <= CHUNK_BYTES)) return yield `chunks of ${manifest.chunk_bytes} bytes; expected 1 to ${CHUNK_BYTES}`;
  const count = chunksOf(manifest);
  if (count > NUM_CHUNKS_MAX) yield `${count} chunks; at most ${NUM_CHUNKS_MAX} are taken`;
  if (manifest.chunk_digests.length !== DIGEST_BYTES * count) yield `${manifest.chunk_digests.length} bytes of digests for ${count} chunks`;
}
