/** SHA-256 in plain JavaScript: `crypto.subtle` is absent on plain http, and answers later. FIPS 180-4. */

const K = new Uint32Array(64), FIRST = new Uint32Array(8);
for (let n = 2, i = 0; i < 64; n++) {
  if (![...Array(n).keys()].slice(2).every((d) => n % d)) continue;
  if (i < 8) FIRST[i] = fraction(Math.sqrt(n));
  K[i++] = fraction(Math.cbrt(n));
}

function fraction(root) {
  return Math.floor((root - Math.floor(root)) * 2 ** 32);
}

/** One running digest; `update` with pieces, then `digest` once. */
export class Sha256 {
  constructor() {
    this.state = FIRST.slice();
    this.block = new Uint8Array(64);
    this.view = new DataView(this.block.buffer);
    this.words = new Int32Array(64);
    this.filled = 0;
    this.length = 0;
  }

  /** @param {Uint8Array} bytes */
  update(bytes) {
    this.length += bytes.length;
    for (let start = 0; start < bytes.length; ) {
      const size = Math.min(64 - this.filled, bytes.length - start);
      this.block.set(bytes.subarray(start, start + size), this.filled);
      start += size;
      this.filled += size;
      if (this.filled === 64) this.#mix();
    }
    return this;
  }

  /** @returns {Uint8Array} 32 bytes */
  digest() {
    const bits = this.length * 8;
    const padding = new Uint8Array(((119 - (this.length % 64)) % 64) + 9);
    padding[0] = 0x80;
    const view = new DataView(padding.buffer);
    view.setUint32(padding.length - 8, Math.floor(bits / 2 ** 32));
    view.setUint32(padding.length - 4, bits >>> 0);
    this.update(padding);
    const found = new DataView(new ArrayBuffer(32));
    this.state.forEach((word, i) => found.setUint32(4 * i, word));
    return new Uint8Array(found.buffer);
  }

  #mix() {
    const w = this.words, view = this.view, s = this.state;
    for (let i = 0; i < 16; i++) w[i] = view.getInt32(4 * i);
    for (let i = 16; i < 64; i++) {
      const a = w[i - 15], b = w[i - 2];
      const s0 = ((a >>> 7) | (a << 25)) ^ ((a >>> 18) | (a << 14)) ^ (a >>> 3);
      const s1 = ((b >>> 17) | (b << 15)) ^ ((b >>> 19) | (b << 13)) ^ (b >>> 10);
      w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
    }
    let a = s[0] | 0, b = s[1] | 0, c = s[2] | 0, d = s[3] | 0, e = s[4] | 0, f = s[5] | 0, g = s[6] | 0, h = s[7] | 0;
    for (let i = 0; i < 64; i++) {
      const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + K[i] + w[i]) | 0;
      const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, i) => (s[i] += word));
    this.filled = 0;
  }
}

/** @param {Uint8Array} bytes @returns {Uint8Array} */
export const sha256 = (bytes) => new Sha256().update(bytes).digest();

/** In hexadecimal. @param {Uint8Array} bytes */
export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** @param {Uint8Array} bytes */
export const sha256Hex = (bytes) => hex(sha256(bytes));

/** The same by `crypto.subtle` where that is, which is several times faster. @param {Uint8Array} bytes @returns {Promise<string>} */
export async function digestOf(bytes) {
  const subtle = globalThis.crypto?.subtle;
  return subtle ? hex(new Uint8Array(await subtle.digest("SHA-256", bytes))) : sha256Hex(bytes);
}
