/** ChaCha20 and ChaCha20-Poly1305 of RFC 8439, which `crypto.subtle` does not have; messages are short, streams as long as an adapter. */
import { WireError } from "../../engine/errors.mjs";

export const TAG_BYTES = 16;
const SIGMA = [0x61707865, 0x3320646e, 0x79622d32, 0x6b206574];
const MODULUS = (1n << 130n) - 5n, CLAMP = 0x0ffffffc0ffffffc0ffffffc0fffffffn;

/**
 * Key stream under a nonce of zeros.
 * @param {Uint8Array} key 32 bytes
 * @param {number} counter of its first block
 * @param {number} count bytes
 */
export function keyStream(key, counter, count) {
  const view = new DataView(key.buffer, key.byteOffset, 32), found = new Uint8Array(Math.ceil(count / 64) * 64), out = new DataView(found.buffer);
  const start = Uint32Array.from([...SIGMA, ...Array.from({ length: 8 }, (_, i) => view.getUint32(4 * i, true)), 0, 0, 0, 0]), x = new Uint32Array(16);
  for (let at = 0; at < found.length; at += 64) {
    start[12] = counter++;
    x.set(start);
    for (let round = 0; round < 10; round++) {
      quarter(x, 0, 4, 8, 12), quarter(x, 1, 5, 9, 13), quarter(x, 2, 6, 10, 14), quarter(x, 3, 7, 11, 15);
      quarter(x, 0, 5, 10, 15), quarter(x, 1, 6, 11, 12), quarter(x, 2, 7, 8, 13), quarter(x, 3, 4, 9, 14);
    }
    for (let i = 0; i < 16; i++) out.setUint32(at + 4 * i, x[i] + start[i], true);
  }
  return found.subarray(0, count);
}

/** Encrypt and authenticate, under a key that is used once. */
export function sealed(key, text) {
  const cipher = xored(key, text), whole = new Uint8Array(cipher.length + TAG_BYTES);
  whole.set(cipher);
  whole.set(tagOf(key, cipher), cipher.length);
  return whole;
}

/** Text of what was sealed; WireError if another key sealed it, or it was changed. */
export function opened(key, whole) {
  const cipher = whole.subarray(0, Math.max(0, whole.length - TAG_BYTES)), tag = whole.subarray(cipher.length);
  if (tag.length !== TAG_BYTES || tagOf(key, cipher).reduce((wrong, byte, i) => wrong | (byte ^ tag[i]), 0)) throw new WireError("what was sealed is damaged, or of another key");
  return xored(key, cipher);
}

function xored(key, text) {
  const stream = keyStream(key, 1, text.length);
  return text.map((byte, i) => byte ^ stream[i]);
}

/** Poly1305 of a text without further data. */
function tagOf(key, cipher) {
  const once = keyStream(key, 0, 32), r = number(once.subarray(0, 16)) & CLAMP, s = number(once.subarray(16));
  const padded = new Uint8Array(Math.ceil(cipher.length / 16) * 16 + 16);
  padded.set(cipher);
  new DataView(padded.buffer).setUint32(padded.length - 8, cipher.length, true);
  let total = 0n;
  for (let at = 0; at < padded.length; at += 16) total = ((total + number(padded.subarray(at, at + 16)) + (1n << 128n)) * r) % MODULUS;
  return bytesOfNumber((total + s) & ((1n << 128n) - 1n), 16);
}

/** Bytes, lowest first, as a number. */
export const number = (bytes) => bytes.reduceRight((sum, byte) => (sum << 8n) | BigInt(byte), 0n);

/** A number as so many bytes, lowest first. */
export const bytesOfNumber = (value, count) => Uint8Array.from({ length: count }, (_, i) => Number((value >> BigInt(8 * i)) & 255n));

function quarter(x, a, b, c, d) {
  x[a] += x[b], x[d] = turned(x[d] ^ x[a], 16);
  x[c] += x[d], x[b] = turned(x[b] ^ x[c], 12);
  x[a] += x[b], x[d] = turned(x[d] ^ x[a], 8);
  x[c] += x[d], x[b] = turned(x[b] ^ x[c], 7);
}

const turned = (word, by) => (word << by) | (word >>> (32 - by));
