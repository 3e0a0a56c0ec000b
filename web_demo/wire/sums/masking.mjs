/** Masks over a device's numbers: one of its own, and one with each neighbour that the other takes away again; as Python's `secure_sums/masking`. */
import { reduced } from "./grid.mjs";
import { ownStream, pairStream } from "./keys.mjs";

/**
 * Mask a device's numbers, in place; WireError for a peer's key that is none.
 * @param {BigUint64Array} numbers
 * @param {{scope: import("./keys.mjs").Scope, deviceId: string, place: number, secret: Uint8Array, seed: Uint8Array}} masker
 * @param {{place: number, device_id: string, mask_key: Uint8Array}[]} peers
 * @param {import("./grid.mjs").Grid} grid
 */
export async function mask(numbers, { scope, deviceId, place, secret, seed }, peers, grid) {
  const count = 8 * numbers.length;
  add(numbers, await ownStream(seed, scope, deviceId, count), 1);
  for (const peer of peers) add(numbers, await pairStream(secret, peer.mask_key, scope, [deviceId, peer.device_id], count), place < peer.place ? 1 : -1);
  reduced(numbers, grid);
}

/** Add a stream, 8 bytes a number with the lowest first, modulo 2**64, word by word. */
function add(numbers, stream, sign) {
  const own = new Uint32Array(numbers.buffer, numbers.byteOffset, 2 * numbers.length), given = new Uint32Array(stream.buffer, stream.byteOffset, own.length);
  for (let i = 0; i < own.length; i += 2) {
    const low = own[i] + sign * given[i], carry = low < 0 ? -1 : low >= 2 ** 32 ? 1 : 0;
    [own[i], own[i + 1]] = [low, own[i + 1] + sign * given[i + 1] + carry];
  }
}
