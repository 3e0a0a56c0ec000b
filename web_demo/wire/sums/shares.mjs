/** Shamir's secret sharing of 32 bytes, as Python's `secure_sums/shares`; the aggregator alone puts shares together. */
import { WireError } from "../../engine/errors.mjs";
import { bytesOfNumber, number } from "./chacha.mjs";

export const PRIME = 2n ** 257n - 93n, SECRET_BYTES = 32, SHARE_BYTES = 33;
const HOLDERS_MAX = 2 ** 16;

/**
 * Share a secret among holders, each a number from 1; equal calls give other shares.
 * @param {Uint8Array} secret
 * @param {number[]} holders
 * @param {number} threshold shares that give the secret
 * @returns {Map<number, Uint8Array>}
 */
export function split(secret, holders, threshold) {
  if (!(threshold >= 1 && threshold <= holders.length)) throw new WireError(`${threshold} shares needed, of ${holders.length}`);
  if (new Set(holders).size !== holders.length || !holders.every((holder) => holder >= 1 && holder <= HOLDERS_MAX))
    throw new WireError(`holders of shares: different numbers from 1 to ${HOLDERS_MAX}`);
  if (secret.length !== SECRET_BYTES) throw new WireError(`secret of ${secret.length} bytes; expected ${SECRET_BYTES}`);
  const coefficients = [...Array.from({ length: threshold - 1 }, drawn), number(secret)];
  return new Map(holders.map((holder) => [holder, bytesOfNumber(value(coefficients, BigInt(holder)), SHARE_BYTES)]));
}

const value = (coefficients, at) => coefficients.reduce((total, one) => (total * at + one) % PRIME, 0n);

/** A number below the prime, each as likely. */
function drawn() {
  for (;;) {
    const bytes = crypto.getRandomValues(new Uint8Array(SHARE_BYTES));
    bytes[SHARE_BYTES - 1] &= 1;
    const found = number(bytes);
    if (found < PRIME) return found;
  }
}
