/** Deflate in bounds: what travels shorter when entropy-coded, and nothing that inflates to more than it said. */
import { deflateSync, inflateSync } from "fflate";
import { WireError } from "../../engine/errors.mjs";

const LEAST_BYTES = 64;

/** Entropy-coded where that is shorter, else the content itself: the length tells which. @param {Uint8Array} content */
export function deflated(content) {
  if (content.length < LEAST_BYTES) return content;
  const packed = deflateSync(content, { level: 6 });
  return packed.length < content.length ? packed : content;
}

/** Inflate to exactly `size` bytes; not a byte beyond them is ever made. */
export function inflated(data, size, what) {
  let found;
  try {
    // fflate stops where its buffer ends: a byte more than expected tells a stream that is longer.
    found = inflateSync(data, { out: new Uint8Array(size + 1) });
  } catch (error) {
    throw new WireError(`${what}: ${error.message}`);
  }
  if (found.length !== size) throw new WireError(`${what}: does not inflate to ${size} bytes and no more`);
  return found;
}
