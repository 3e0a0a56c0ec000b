/** Who vouches for the keys of a sum under masks: a device's certificate signs them, and an authority signed that; as Python's `secure_sums/vouching`. */
import { ConfigError, oneLine, WireError } from "../../engine/errors.mjs";
import { pack } from "../msgpack.mjs";
import { pemBlocks } from "../pem.mjs";
import { didSignKeys, isIssuedBy, readCertificate, signsAs, written } from "./certificates.mjs";

const PURPOSE = "fleetune secure sums: keys of one device in one group\n", CLIENT = "1.3.6.1.5.5.7.3.2";
const CERTIFICATE_BYTES_MAX = 4096, PEM_CHARS_MAX = 65536, CERTIFICATES = ["CERTIFICATE", "X509 CERTIFICATE"];
const day = (date) => date.toISOString().slice(0, 10);

/** A device's certificate, and its private key, which cannot be read out. A structured clone takes both: what a page keeps are they. */
export class Voucher {
  /** @param {Uint8Array} certificate DER @param {CryptoKey} key ECDSA, or RSA with PKCS1 v1.5, both over SHA-256 */
  constructor(certificate, key) {
    [this.certificate, this.key] = [certificate, key];
  }

  /** Sign the keys of this device in one group. @param {import("./keys.mjs").Scope} scope */
  async vouch(scope, deviceId, maskKey, shareKey) {
    const made = await crypto.subtle.sign({ name: this.key.algorithm.name, hash: "SHA-256" }, this.key, said(scope, deviceId, maskKey, shareKey));
    return { certificate: this.certificate, signature: written(readCertificate(this.certificate).key, new Uint8Array(made)) };
  }
}

/** Those of which one must have signed a certificate. */
export class Authorities {
  /** @param {import("./certificates.mjs").Read[]} certificates */
  constructor(certificates) {
    this.certificates = certificates;
  }

  /** Why a certificate (DER) is not one that they gave a device; empty if it is. */
  async problem(certificate, now = new Date()) {
    const found = readOrNull(certificate);
    if (!found) return "its certificate is damaged";
    const signed = await Promise.all(this.certificates.map((issuer) => isIssuedBy(found, issuer)));
    if (!signed.includes(true)) return "no authority that this device trusts signed its certificate";
    if (found.purposes.length && !found.purposes.includes(CLIENT)) return "its certificate is no device's: it is for something else";
    return found.from <= now && now <= found.to ? "" : `its certificate holds from ${day(found.from)} to ${day(found.to)}`;
  }
}

/** Why keys are not those that the holder of the certificate beside them signed for this group; empty if they are. */
export async function problemOfPeer(scope, { device_id, mask_key, share_key, certificate, signature }) {
  if (!certificate.length) return "no certificate is beside its keys";
  const found = readOrNull(certificate), damaged = "its certificate is damaged, or of a kind of key that is not taken";
  if (!found) return damaged;
  if (found.names.length !== 1 || found.names[0] !== device_id) return `its certificate is of '${oneLine(found.names[0] ?? "")}'`;
  const did = await didSignKeys(found.key, signature, said(scope, device_id, mask_key, share_key));
  return did ? "" : did === null ? damaged : "its certificate's key did not sign its keys for this group";
}

/** One or more certificates of authorities, PEM; ConfigError if there is none, or one is damaged. */
export function openAuthorities(text, where = "the masks' authority") {
  const found = blocksOf(text, where).filter(({ kind }) => CERTIFICATES.includes(kind)).map(({ der }) => der && readOrNull(der));
  if (!found.length || found.includes(null)) throw new ConfigError(`${where}: no certificate of an authority in PEM (ca.crt of fleetune authority)`);
  return new Authorities(found);
}

/**
 * A device's voucher of its certificate, whose first is taken, and its key (PKCS8, not encrypted), both PEM.
 * ConfigError if one is damaged, they do not belong together, or are of another device or a kind that cannot vouch.
 */
export async function openVoucher(certificate, key, { deviceId, now = new Date() }) {
  const where = "this device's certificate", { der } = blocksOf(certificate, where).find(({ kind }) => CERTIFICATES.includes(kind)) ?? {}, found = der && readOrNull(der);
  if (!found) throw new ConfigError(`${where}: no certificate in PEM; choose the file that its authority gave back (NAME.crt)`);
  if (found.names.length !== 1 || found.names[0] !== deviceId) throw new ConfigError(`${where} is of '${oneLine(found.names[0] ?? "")}'; this device is '${deviceId}'`);
  if (!globalThis.crypto?.subtle) throw new ConfigError(`${where} needs crypto.subtle; open the page over https or on localhost`);
  if (der.length > CERTIFICATE_BYTES_MAX) throw new ConfigError(`${where} has ${der.length} bytes; at most ${CERTIFICATE_BYTES_MAX} are sent`);
  if (!(found.from <= now && now <= found.to)) throw new ConfigError(`${where} holds from ${day(found.from)} to ${day(found.to)}; ask its authority for another`);
  const voucher = new Voucher(der, await privateKey(key, found.key)), scope = { job: "", group: "" }, none = new Uint8Array(32);
  const made = await voucher.vouch(scope, deviceId, none, none), problem = await problemOfPeer(scope, { device_id: deviceId, mask_key: none, share_key: none, ...made });
  if (problem) throw new ConfigError(`${where} and its key do not belong together`);
  return voucher;
}

async function privateKey(text, key) {
  const where = "this device's key", blocks = blocksOf(text, where), found = blocks.find(({ kind }) => kind === "PRIVATE KEY"), algorithm = signsAs(key);
  if (!algorithm) throw new ConfigError(`${where} is of a kind that cannot vouch for others' masks; expected ECDSA on P-256, P-384 or P-521, or RSA`);
  if (blocks.some(({ kind }) => kind === "ENCRYPTED PRIVATE KEY")) throw new ConfigError(`${where} is encrypted; give it without a password: openssl pkcs8 -topk8 -nocrypt makes such a file`);
  if (!found?.der) throw new ConfigError(`${where}: no private key in PEM (PKCS8); choose the file that fleetune enrol made (NAME.key)`);
  return crypto.subtle.importKey("pkcs8", found.der, algorithm, false, ["sign"]).catch(() => {
    throw new ConfigError(`${where} is damaged, or not of the certificate's kind`);
  });
}

function blocksOf(text, where) {
  if (text.length > PEM_CHARS_MAX) throw new ConfigError(`${where}: more than ${PEM_CHARS_MAX} characters; expected PEM`);
  return pemBlocks(text);
}

function readOrNull(der) {
  try {
    return readCertificate(der);
  } catch (error) {
    if (error instanceof WireError) return null;
    throw error;
  }
}

const said = ({ job, group }, deviceId, maskKey, shareKey) => Uint8Array.from([...new TextEncoder().encode(PURPOSE), ...pack([job, group, deviceId, maskKey, shareKey])]);
