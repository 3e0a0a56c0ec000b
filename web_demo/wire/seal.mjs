/** The signature at the end of a message: one more field of its map; docs/protocol.md, "Signed messages". Nothing here is verified. */
import { hex } from "../engine/sha256.mjs";

export const KEY_ID_BYTES = 8, SIGNATURE_BYTES = 64;
const PURPOSE = "fleetune v1: an aggregator's message\n", SIZE = KEY_ID_BYTES + 16 + SIGNATURE_BYTES;
/** MessagePack of the text `signed`, and the head of so many bytes. */
const FIELD = Uint8Array.of(0xa6, ...new TextEncoder().encode("signed"), 0xc4, SIZE);

/**
 * @typedef {{start: bigint, number: bigint}} Stamp where in the life of a job a message was said
 * @typedef {{keyId: string, stamp: Stamp, signature: Uint8Array, covered: Uint8Array}} Seal `keyId` in hexadecimal; `covered`: what the signature is to be of
 */

/** The seal of a message that came on `topic`; null if it has none. @param {Uint8Array} payload @returns {Seal|null} */
export function parseSeal(topic, payload) {
  const at = payload.length - SIZE;
  if (at < FIELD.length || !FIELD.every((byte, i) => payload[at - FIELD.length + i] === byte)) return null;
  const view = new DataView(payload.buffer, payload.byteOffset + at, SIZE);
  return {
    keyId: hex(payload.subarray(at, at + KEY_ID_BYTES)), stamp: { start: view.getBigUint64(KEY_ID_BYTES), number: view.getBigUint64(KEY_ID_BYTES + 8) },
    signature: payload.subarray(-SIGNATURE_BYTES), covered: coveredBy(topic, payload.subarray(0, -SIGNATURE_BYTES)),
  };
}

/** Whether a message was said before another. @param {Stamp} one @param {Stamp} other */
export const isBefore = (one, other) => one.start < other.start || (one.start === other.start && one.number < other.number);

function coveredBy(topic, said) {
  const text = new TextEncoder(), purpose = text.encode(PURPOSE), name = text.encode(topic), whole = new Uint8Array(purpose.length + 2 + name.length + said.length);
  whole.set(purpose);
  new DataView(whole.buffer).setUint16(purpose.length, name.length);
  whole.set(name, purpose.length + 2);
  whole.set(said, purpose.length + 2 + name.length);
  return whole;
}
