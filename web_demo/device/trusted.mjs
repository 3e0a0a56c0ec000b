/** The public keys that a device's owner pins, Ed25519 in PEM; `crypto.subtle` alone computes. */
import { ArtifactError, ConfigError, oneLine } from "../engine/errors.mjs";
import { hex, sha256 } from "../engine/sha256.mjs";
import { pemBlocks } from "../wire/pem.mjs";
import { KEY_ID_BYTES, SIGNATURE_BYTES } from "../wire/seal.mjs";

/** What stands before the 32 bytes of an Ed25519 key in its SubjectPublicKeyInfo. RFC 8410. */
const HEAD = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00], PEM_CHARS_MAX = 65536;
const ARTIFACT = "fleetune v1: an artifact\n";
const ABSENT = "this browser has no Ed25519 in crypto.subtle here, which a job with a pinned key needs: open the page over https or on localhost, in a browser of 2025 or later";

/** Keys of a PEM text, one or more. @param {string} text @returns {Promise<Trusted>} ConfigError for none, another sort, or a browser that cannot verify */
export async function trustedOf(text) {
  const keys = keysOf(text), subtle = globalThis.crypto?.subtle;
  if (!subtle) throw new ConfigError(ABSENT);
  try {
    return new Trusted(await Promise.all(keys.map(async (raw) => [idOf(raw), await subtle.importKey("raw", raw, { name: "Ed25519" }, false, ["verify"])])));
  } catch (error) {
    throw new ConfigError(error?.name === "NotSupportedError" ? ABSENT : `the aggregator's public key is damaged: ${oneLine(error?.message ?? error)}`);
  }
}

const idOf = (raw) => hex(sha256(raw).subarray(0, KEY_ID_BYTES));

/** How people tell the keys of a PEM text from others; errors as `trustedOf`. */
export const namesOf = (text) => keysOf(text).map(idOf);

function keysOf(text) {
  const where = "the aggregator's public key";
  if (text.length > PEM_CHARS_MAX) throw new ConfigError(`${where}: more than ${PEM_CHARS_MAX} characters; expected keys in PEM`);
  const blocks = pemBlocks(text), strange = blocks.find(({ kind }) => kind !== "PUBLIC KEY");
  if (strange) throw new ConfigError(`${where}: this is a ${oneLine(strange.kind.toLowerCase(), 40)}; expected public keys alone, in PEM (aggregator.pub)`);
  if (!blocks.length) throw new ConfigError(`${where}: no public key in PEM; expected lines from -----BEGIN PUBLIC KEY----- to -----END PUBLIC KEY-----`);
  return blocks.map(({ der }) => {
    if (!der) throw new ConfigError(`${where}: a public key in it is damaged; copy it again`);
    if (der.length !== HEAD.length + 32 || !HEAD.every((byte, i) => der[i] === byte)) throw new ConfigError(`${where}: a key of another sort, or damaged; expected Ed25519`);
    return der.slice(HEAD.length);
  });
}

export class Trusted {
  /** @param {[string, CryptoKey][]} keys by id */
  constructor(keys) {
    this.keys = new Map(keys);
  }

  /** The keys, as people tell them from others. */
  get names() {
    return [...this.keys.keys()].join(" or ");
  }

  knows = (keyId) => this.keys.has(keyId);

  /** Whether the key that a seal names is among them and did sign. @param {import("../wire/seal.mjs").Seal} seal */
  verify = ({ keyId, signature, covered }) => this.didSign(keyId, signature, covered);

  async didSign(keyId, signature, covered) {
    const key = this.keys.get(keyId);
    return Boolean(key) && globalThis.crypto.subtle.verify({ name: "Ed25519" }, key, signature, covered);
  }

  /** ArtifactError unless one of the keys has signed the artifact. @param {Uint8Array|null} said content of `manifest.sig`; null for none */
  async checkArtifact(artifact, said) {
    const expected = `expected an artifact that key ${this.names} signed`;
    if (!said) throw new ArtifactError(`${expected}; nobody did: run fleetune sign, and serve it again`);
    if (said.length !== KEY_ID_BYTES + SIGNATURE_BYTES) throw new ArtifactError(`${expected}; manifest.sig is damaged`);
    const keyId = hex(said.subarray(0, KEY_ID_BYTES)), digest = artifact.digest.match(/../g).map((pair) => parseInt(pair, 16));
    const covered = Uint8Array.from([...new TextEncoder().encode(ARTIFACT), ...digest]);
    if (!(await this.didSign(keyId, said.subarray(KEY_ID_BYTES), covered))) throw new ArtifactError(`${expected}; manifest.sig is of key ${keyId}, or of another artifact`);
  }
}
