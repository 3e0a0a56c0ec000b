/**
 * Keys, seals and key streams of secure sums, as Python's `secure_sums/keys`: X25519 and HKDF by `crypto.subtle`.
 * A key is of one purpose, job, group and pair of devices, and is used once.
 */
import { ConfigError, WireError } from "../../engine/errors.mjs";
import { sha256 } from "../../engine/sha256.mjs";
import { pack } from "../msgpack.mjs";
import { keyStream, opened, sealed } from "./chacha.mjs";

export const KEY_BYTES = 32;
const PURPOSE = "fleetune secure sums 1", SEAL = "seal", PAIR = "pair mask", SELF = "own mask";
/** PKCS8 of an X25519 key, but for its 32 bytes. */
const PKCS8 = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x6e, 4, 0x22, 4, 0x20];

/** @typedef {{job: string, group: string}} Scope where a key is good: nowhere else */

/** ConfigError where this browser, or this page's address, has no X25519. */
export async function needX25519() {
  if (!globalThis.crypto?.subtle) throw new ConfigError("masks need crypto.subtle; open the page over https or on localhost");
  await crypto.subtle.generateKey("X25519", false, ["deriveBits"]).catch(() => {
    throw new ConfigError("masks need X25519, which this browser lacks; a newer one has it");
  });
}

/** 32 random bytes: a private key, or a seed. */
export const newSecret = () => crypto.getRandomValues(new Uint8Array(KEY_BYTES));

/** The public key of a private one. */
export async function publicOf(secret) {
  const { x } = await crypto.subtle.exportKey("jwk", await privateKey(secret, true));
  return Uint8Array.from(atob(x.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));
}

/** Encrypt and authenticate for one device, once in a scope. */
export async function seal(text, secret, publicKey, scope, { sender, receiver }) {
  return sealed(await derived(await agree(secret, publicKey), scope, [SEAL, sender, receiver]), text);
}

/** Decrypt what `sender` sealed; WireError if it is not its, not for this receiver, or of another scope. */
export async function unseal(whole, secret, publicKey, scope, { sender, receiver }) {
  return opened(await derived(await agree(secret, publicKey), scope, [SEAL, sender, receiver]), whole);
}

/** Key stream that two devices share, so many bytes. @param {string[]} devices in either order */
export async function pairStream(secret, publicKey, scope, devices, count) {
  return keyStream(await derived(await agree(secret, publicKey), scope, [PAIR, ...[...devices].sort()]), 0, count);
}

/** Key stream of one device's seed, so many bytes. */
export const ownStream = async (seed, scope, device, count) => keyStream(await derived(seed, scope, [SELF, device]), 0, count);

/** What tells a seed again, and nothing of it. */
export const digestOfSeed = (seed) => sha256(Uint8Array.from([...new TextEncoder().encode(`${PURPOSE} seed\0`), ...seed]));

/** X25519; WireError for a public key of another length or of small order, with which nothing would be secret. */
async function agree(secret, publicKey) {
  try {
    const other = await crypto.subtle.importKey("raw", publicKey, "X25519", false, []);
    const found = new Uint8Array(await crypto.subtle.deriveBits({ name: "X25519", public: other }, await privateKey(secret), 8 * KEY_BYTES));
    if (found.some(Boolean)) return found;
  } catch {
    // told below
  }
  throw new WireError("a public key of another length or of small order");
}

const privateKey = (secret, isExtractable = false) => crypto.subtle.importKey("pkcs8", Uint8Array.from([...PKCS8, ...secret]), "X25519", isExtractable, ["deriveBits"]);

async function derived(secret, { job, group }, purpose) {
  const key = await crypto.subtle.importKey("raw", secret, "HKDF", false, ["deriveBits"]), info = pack([PURPOSE, purpose, job, group]);
  return new Uint8Array(await crypto.subtle.deriveBits({ name: "HKDF", hash: "SHA-256", salt: new Uint8Array(0), info }, key, 8 * KEY_BYTES));
}
