/** Deflate in bounds: what travels shorter when entropy-coded, and nothing that inflates to more than it said. */
import { deflateSync, inflateSync, unzlibSync, zlibSync } from "fflate";
import { WireError } from "../../engine/errors.mjs";

const LEAST_BYTES = 64;

/** Entropy-coded where that is shorter, else the content itself: the length tells which. @param {Uint8Array} content */
export function deflated(content) {
  if (content.length < LEAST_BYTES) return content;
  const packed = deflateSync(content, { level: 6 });
  return packed.length < content.length ? packed : content;
}

/** Inflate to exactly `size` bytes; not a byte beyond them is ever made. */
export const inflated = (data, size, what) => opened(inflateSync, data, size, what);

/** The same of a zlib stream, whose checksum is looked at. */
export function unzlibbed(data, size, what) {
  const found = opened(unzlibSync, data, size, what), view = new DataView(data.buffer, data.byteOffset, data.length);
  if (view.getUint32(data.length - 4) !== adler32(found)) throw new WireError(`${what}: incorrect data check`);
  return found;
}

/** @param {Uint8Array} content */
export const zlibbed = (content) => zlibSync(content, { level: 1 });

function opened(open, data, size, what) {
  let found;
  try {
    // fflate stops where its buffer ends: a byte more than expected tells a stream that is longer.
    found = open(data, { out: new Uint8Array(size + 1) });
  } catch (error) {
    throw new WireError(`${what}: ${error.message}`);
  }
  if (found.length !== size) throw new WireError(`${what}: does not inflate to ${size} bytes and no more`);
  return found;
}

function adler32(content) {
  let a = 1, b = 0;
  for (let i = 0; i < content.length; ) {
    const end = Math.min(i + 3800, content.length);
    for (; i < end; i++) b += a += content[i];
    [a, b] = [a % 65521, b % 65521];
  }
  return b * 65536 + a;
}
