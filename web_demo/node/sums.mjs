/**
 * `node sums.mjs CASE.json`: the parts of a sum under masks on given keys, one line of JSON; all bytes are hexadecimal.
 * Case: secret, seed, public, scope, names [own, other], sealed, text, holders, threshold, grid, values and reference (safetensors), weight, drawn (seed of the
 * rounding), place, peers ({place, device_id, mask_key}).
 */
import { readFile } from "node:fs/promises";
import { readTensors } from "../engine/safetensors.mjs";
import { hex } from "../engine/sha256.mjs";
import { placed, writeNumbers } from "../wire/sums/grid.mjs";
import { digestOfSeed, ownStream, pairStream, publicOf, seal, unseal } from "../wire/sums/keys.mjs";
import { mask } from "../wire/sums/masking.mjs";
import { split } from "../wire/sums/shares.mjs";

const bytes = (text) => Uint8Array.from(Buffer.from(text, "hex")), tensors = (text) => readTensors(bytes(text)).arrays;
const refusal = (promise) => promise.then(() => "taken", (error) => `${error.name}: ${error.message}`);
const given = JSON.parse(await readFile(process.argv[2], "utf8")), { scope, names, grid, holders, threshold, place } = given, [own, other] = names;
const [secret, seed, publicKey, sealed, text] = [given.secret, given.seed, given.public, given.sealed, given.text].map(bytes);

const { numbers, numCut } = placed(tensors(given.values), tensors(given.reference), grid, { weight: given.weight, seed: given.drawn }), plain = hex(writeNumbers(numbers, grid));
await mask(numbers, { scope, deviceId: own, place, secret, seed }, given.peers.map((peer) => ({ ...peer, mask_key: bytes(peer.mask_key) })), grid);
const changed = Uint8Array.from(sealed, (byte, i) => (i === 3 ? byte ^ 1 : byte)), from = { sender: other, receiver: own };
console.log(JSON.stringify({
  public: hex(await publicOf(secret)), digest: hex(digestOfSeed(seed)), numCut, plain, masked: hex(writeNumbers(numbers, grid)),
  pair: hex(await pairStream(secret, publicKey, scope, names, 200)), own: hex(await ownStream(seed, scope, own, 200)),
  sealed: hex(await seal(text, secret, publicKey, scope, { sender: own, receiver: other })), opened: hex(await unseal(sealed, secret, publicKey, scope, from)),
  shares: [...split(secret, holders, threshold)].map(([holder, share]) => [holder, hex(share)]),
  refused: [
    await refusal(unseal(changed, secret, publicKey, scope, from)), await refusal(unseal(sealed, secret, publicKey, { ...scope, group: "2-0" }, from)),
    await refusal(unseal(sealed.subarray(0, 9), secret, publicKey, scope, from)), await refusal(seal(text, secret, new Uint8Array(32), scope, from)),
    await refusal(seal(text, secret, new Uint8Array(31), scope, from)), await refusal((async () => split(secret, [1, 1], 2))()),
  ],
}));
