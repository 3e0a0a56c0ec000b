/**
 * X.509 certificates: what one says, and whose key signed what. DER is read by `@peculiar/asn1-x509`, keys and signatures by `crypto.subtle`.
 * Of certificates that could be written in two ways none but the strict one is taken, as in Python.
 */
import { AsnConvert, AsnIntegerArrayBufferConverter, AsnProp, AsnPropTypes } from "@peculiar/asn1-schema";
import { Certificate, ExtendedKeyUsage } from "@peculiar/asn1-x509";
import { WireError } from "../../engine/errors.mjs";

const EC = "1.2.840.10045.2.1", RSA = "1.2.840.113549.1.1.1", ED25519 = "1.3.101.112";
const COMMON_NAME = "2.5.4.3", PURPOSES = "2.5.29.37", VERSIONS = [0, 2];
/** Curves by their identifiers, in DER: name, and bytes of a number. */
const CURVES = { "06082a8648ce3d030107": ["P-256", 32], "06052b81040022": ["P-384", 48], "06052b81040023": ["P-521", 66] };
/** How certificates are signed: kind of key and digest, by the algorithm's identifier. SHA-1 is not among them. */
const SIGNED = {
  "1.2.840.10045.4.3.2": [EC, "SHA-256"], "1.2.840.10045.4.3.3": [EC, "SHA-384"], "1.2.840.10045.4.3.4": [EC, "SHA-512"],
  "1.2.840.113549.1.1.11": [RSA, "SHA-256"], "1.2.840.113549.1.1.12": [RSA, "SHA-384"], "1.2.840.113549.1.1.13": [RSA, "SHA-512"], [ED25519]: [ED25519, ""],
};

/** An ECDSA signature as certificates have it; `crypto.subtle` has both numbers one after the other. */
class Signature {
  r = new ArrayBuffer(0);
  s = new ArrayBuffer(0);
}
for (const name of ["r", "s"]) AsnProp({ type: AsnPropTypes.Integer, converter: AsnIntegerArrayBufferConverter })(Signature.prototype, name);

/**
 * @typedef {{kind: string, curve: string, spki: Uint8Array}} PublicKey `kind`: its algorithm's identifier; `curve`: in hexadecimal DER
 * @typedef {{der: Uint8Array, subject: string, issuer: string, names: (string|null)[], purposes: string[], from: Date, to: Date, key: PublicKey,
 *   covered: Uint8Array, algorithm: string, signature: Uint8Array}} Read `subject`, `issuer`: hexadecimal DER; `names`: common names of the subject
 */

/** What a certificate says, of which nothing is verified. @param {Uint8Array} der @returns {Read} WireError where it is none, or not strict DER */
export function readCertificate(der) {
  try {
    return opened(der);
  } catch (error) {
    throw new WireError(`a damaged certificate: ${error.message}`);
  }
}

/** Whether the key of `issuer` signed a certificate, and is named in it. @param {Read} found @param {Read} issuer */
export async function isIssuedBy(found, issuer) {
  const [kind, hash] = SIGNED[found.algorithm] ?? [];
  return found.issuer === issuer.subject && kind === issuer.key.kind && (await didSign(issuer.key, hash, found.signature, found.covered)) === true;
}

/** Whether a key, ECDSA or RSA, made a signature over SHA-256; null for another kind of key, or one that is damaged. */
export const didSignKeys = async (key, signature, covered) => ([EC, RSA].includes(key.kind) ? didSign(key, "SHA-256", signature, covered) : null);

/** What imports the private key of a certificate's key, so that it signs over SHA-256; null for another kind. @param {PublicKey} key */
export const signsAs = (key) => ([EC, RSA].includes(key.kind) ? algorithmOf(key, "SHA-256") : null);

/** A signature of `crypto.subtle` as certificates and messages have it. @param {PublicKey} key */
export function written(key, signature) {
  if (key.kind !== EC) return signature;
  const half = signature.length / 2, [r, s] = [signature.subarray(0, half), signature.subarray(half)].map(positive);
  return new Uint8Array(AsnConvert.serialize(Object.assign(new Signature(), { r, s })));
}

/** Content of a DER integer: as few bytes as do, the first of which is no sign. */
function positive(number) {
  const digits = number.subarray(number.findIndex(Boolean));
  return Uint8Array.from(digits[0] > 127 ? [0, ...digits] : digits).buffer;
}

async function didSign(key, hash, signature, covered) {
  const algorithm = algorithmOf(key, hash);
  if (!algorithm) return null;
  const imported = await crypto.subtle.importKey("spki", key.spki, algorithm, false, ["verify"]).catch(() => null);
  if (!imported) return null;
  const plain = key.kind === EC ? numbersOf(signature, CURVES[key.curve][1]) : signature;
  return plain !== null && crypto.subtle.verify({ name: algorithm.name, hash }, imported, plain, covered);
}

/** The algorithm of a key, for `crypto.subtle`; null for one that it does not know. */
function algorithmOf({ kind, curve }, hash) {
  if (kind === EC) return Object.hasOwn(CURVES, curve) ? { name: "ECDSA", namedCurve: CURVES[curve][0], hash } : null;
  return kind === RSA ? { name: "RSASSA-PKCS1-v1_5", hash } : kind === ED25519 ? { name: "Ed25519" } : null;
}

/** Both numbers of an ECDSA signature, each of so many bytes; null where it is none. */
function numbersOf(signature, size) {
  try {
    const { r, s } = strictly(signature, Signature), plain = new Uint8Array(2 * size);
    for (const [end, number] of [[size, r], [2 * size, s]].map(([at, bytes]) => [at, new Uint8Array(bytes)])) {
      const digits = number[0] === 0 ? number.subarray(1) : number, isLong = number[0] === 0 && !(digits[0] > 127);
      if (digits.length > size || number[0] > 127 || isLong) return null;
      plain.set(digits, end - digits.length);
    }
    return plain;
  } catch {
    return null;
  }
}

/** Read DER; an error of the library's own, or one for what can be written otherwise. */
function strictly(der, type) {
  const found = AsnConvert.parse(der, type), again = new Uint8Array(AsnConvert.serialize(found));
  if (again.length !== der.length || !again.every((byte, i) => byte === der[i])) throw new Error("not in strict DER");
  return found;
}

function opened(der) {
  const { tbsCertificate: said, tbsCertificateRaw, signatureAlgorithm, signatureValue } = strictly(der, Certificate);
  if (!VERSIONS.includes(said.version)) throw new Error(`version ${said.version + 1}`);
  if (hexOf(said.signature) !== hexOf(signatureAlgorithm)) throw new Error("two algorithms of one signature");
  const extensions = said.extensions ?? [], info = said.subjectPublicKeyInfo, { algorithm, parameters } = info.algorithm;
  if (new Set(extensions.map(({ extnID }) => extnID)).size !== extensions.length) throw new Error("an extension twice");
  const purposes = extensions.find(({ extnID }) => extnID === PURPOSES);
  return {
    der, subject: hexOf(said.subject), issuer: hexOf(said.issuer), from: said.validity.notBefore.getTime(), to: said.validity.notAfter.getTime(),
    names: said.subject.flatMap((part) => [...part]).filter(({ type }) => type === COMMON_NAME).map(({ value }) => (value.anyValue ? null : String(value))),
    purposes: purposes ? [...strictly(new Uint8Array(purposes.extnValue.buffer), ExtendedKeyUsage)] : [],
    key: { kind: algorithm, curve: algorithm === EC && parameters ? hexBytes(parameters) : "", spki: new Uint8Array(AsnConvert.serialize(info)) },
    covered: new Uint8Array(tbsCertificateRaw), algorithm: signatureAlgorithm.algorithm, signature: new Uint8Array(signatureValue),
  };
}

const hexBytes = (bytes) => Array.from(new Uint8Array(bytes), (byte) => byte.toString(16).padStart(2, "0")).join("");
const hexOf = (part) => hexBytes(AsnConvert.serialize(part));
