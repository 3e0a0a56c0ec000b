/**
 * `node vouching.mjs CASES.json`: what a device says of certificates beside keys, one line of JSON; all bytes are hexadecimal.
 * Cases: scope, keys [mask, share], now (ISO), authorities (PEM texts), peers ({device_id, certificate, signature, authority (its index)}), vouchers
 * ({device_id, certificate, key}: PEM) and strange (PEM texts to be opened as authorities).
 */
import { readFile } from "node:fs/promises";
import { hex } from "../engine/sha256.mjs";
import { openAuthorities, openVoucher, problemOfPeer } from "../wire/sums/vouching.mjs";

const given = JSON.parse(await readFile(process.argv[2], "utf8")), { scope } = given, now = new Date(given.now);
const bytes = (text) => Uint8Array.from(Buffer.from(text, "hex")), [mask_key, share_key] = given.keys.map(bytes);
const refusal = (error) => `${error.name}: ${error.message}`, authorities = given.authorities.map((text) => openAuthorities(text));

const told = [];
for (const { device_id, authority, ...said } of given.peers) {
  const certificate = bytes(said.certificate), peer = { device_id, mask_key, share_key, certificate, signature: bytes(said.signature) };
  told.push(await Promise.all([problemOfPeer(scope, peer), authorities[authority].problem(certificate, now)]).catch((error) => [refusal(error), "it threw"]));
}
const vouched = [];
for (const { device_id, certificate, key } of given.vouchers) {
  const made = await openVoucher(certificate, key, { deviceId: device_id, now }).then((voucher) => voucher.vouch(scope, device_id, mask_key, share_key), refusal);
  vouched.push(made.signature ? { certificate: hex(made.certificate), signature: hex(made.signature) } : made);
}
const opened = given.strange.map((text) => {
  try {
    return openAuthorities(text).certificates.length;
  } catch (error) {
    return refusal(error);
  }
});
delete globalThis.crypto;
Object.defineProperty(globalThis, "crypto", { value: undefined });
const [first] = given.vouchers, without = first && (await openVoucher(first.certificate, first.key, { deviceId: first.device_id, now }).catch(refusal));
console.log(JSON.stringify({ told, vouched, opened, without }));
