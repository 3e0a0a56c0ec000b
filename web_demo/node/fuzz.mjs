/**
 * `node fuzz.mjs CASES.json`: damaged bytes for every reader, one line of JSON with how often each refused and what it threw beside our errors.
 * Cases: seed, tries, samples by reader: message, sealed, keys, certificate, authorities, fp32, quant, topk, caesar, xor ({payload, reference}), tensors, manifest, lines (hexadecimal).
 */
import { readFile } from "node:fs/promises";
import { namesOf } from "../device/trusted.mjs";
import { words } from "../engine/draws.mjs";
import { FleetuneError, WireError } from "../engine/errors.mjs";
import { readRows } from "../engine/lines.mjs";
import { parseManifest } from "../engine/manifest.mjs";
import { readTensors } from "../engine/safetensors.mjs";
import { makeCodec, unpackUpdate } from "../wire/codecs/codecs.mjs";
import { decode } from "../wire/messages.mjs";
import { parseSeal } from "../wire/seal.mjs";
import { readCertificate } from "../wire/sums/certificates.mjs";
import { openAuthorities } from "../wire/sums/vouching.mjs";

const { seed, tries, samples, codecs } = JSON.parse(await readFile(process.argv[2], "utf8"));
const bytes = (text) => Uint8Array.from(Buffer.from(text, "hex"));
const READERS = {
  message: decode,
  sealed(content) {
    if (!parseSeal("topic", content)) throw new WireError("no seal");
    return decode(content);
  },
  keys: (content) => namesOf(new TextDecoder().decode(content)),
  certificate: readCertificate,
  authorities: (content) => openAuthorities(new TextDecoder().decode(content)),
  tensors: readTensors,
  manifest: (content) => parseManifest(content, "manifest"),
  lines: (content) => readRows(new TextDecoder().decode(content), "lines"),
};
for (const { name, ratio, bits, reference } of codecs) READERS[name] = (content) => unpackUpdate(makeCodec(name.split(" ")[0], ratio, bits), content, readTensors(bytes(reference)).arrays);

/** A byte changed, some cut out, put in twice, or the end cut off. */
function damaged(whole, number) {
  const [how, at, size, value] = words([seed, "jitter", number, 0], 4), place = at % whole.length, end = Math.min(whole.length, place + 1 + (size % 9));
  const parts = [[whole.subarray(0, place), Uint8Array.of(value & 255), whole.subarray(place + 1)], [whole.subarray(0, place), whole.subarray(end)], [whole.subarray(0, end), whole.subarray(place)], [whole.subarray(0, place)]][how % 4];
  return Uint8Array.from(parts.flatMap((part) => [...part]));
}

const found = {};
for (const [name, texts] of Object.entries(samples)) {
  const row = (found[name] = { refused: 0, strange: [] });
  for (let i = 0; i < tries; i++) {
    try {
      READERS[name](damaged(bytes(texts[i % texts.length]), i));
    } catch (error) {
      if (error instanceof FleetuneError && !error.message.includes("\n")) row.refused++;
      else row.strange.push(String(error.stack).slice(0, 400));
    }
  }
}
console.log(JSON.stringify(found));
