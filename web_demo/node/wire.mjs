/**
 * `node wire.mjs CASES.json`: what the wire makes of given bytes, one line of JSON.
 * Cases: messages ({hex, fields}), payloads ({codec, ratio, bits, values, reference, payload, decodes}; tensors are safetensors in hexadecimal), shas ({hex}),
 * refused ({hex}), files (safetensors in hexadecimal).
 */
import { readFile } from "node:fs/promises";
import { inflateRawSync, inflateSync } from "node:zlib";
import { bytesOf } from "../engine/arrays.mjs";
import { readTensors, writeTensors } from "../engine/safetensors.mjs";
import { hex, sha256Hex } from "../engine/sha256.mjs";
import { makeCodec, packUpdate, unpackUpdate } from "../wire/codecs/codecs.mjs";
import { decode, encode } from "../wire/messages.mjs";
import { unpack } from "../wire/msgpack.mjs";

const bytes = (text) => Uint8Array.from(Buffer.from(text, "hex"));
const tensors = (text) => readTensors(bytes(text)).arrays;
const plain = (value) =>
  value instanceof Uint8Array ? { hex: hex(value) } : Array.isArray(value) ? value.map(plain)
  : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, plain(v)])) : value;

/** A frame with its sections inflated: two deflates may differ in bytes, and what they hold may not. */
function opened(payload, codec) {
  const frame = unpack(payload);
  if (codec === "xor") for (const tensor of frame.get("tensors")) tensor.set("data", inflateSync(tensor.get("data")));
  if (frame.get("v") === 2) {
    const open = ([size, data]) => (data.length === size ? data : new Uint8Array(inflateRawSync(data)));
    frame.set("table", open(frame.get("table")));
    frame.set("parts", new Map([...frame.get("parts")].map(([kind, section]) => [kind, open(section)])));
  }
  return JSON.stringify(frame, (_, v) => (v instanceof Map ? [...v] : v instanceof Uint8Array ? hex(v) : v));
}

function coded({ codec, ratio, bits, values, reference, payload }) {
  const made = makeCodec(codec, ratio, bits), held = tensors(reference), ours = packUpdate(made, tensors(values), held);
  const theirs = bytes(payload), found = unpackUpdate(made, theirs, held), back = unpackUpdate(made, ours.payload, held);
  return {
    sameBytes: hex(ours.payload) === payload, sameContent: opened(ours.payload, codec) === opened(theirs, codec), payload: hex(ours.payload),
    decoded: hex(writeTensors(found)), sameDecoded: Object.keys(found).every((n) => hex(bytesOf(found[n])) === hex(bytesOf(back[n]))),
    sameConveyed: Object.keys(back).every((n) => back[n].data.every((x, i) => x === ours.conveyed[n].data[i])),
  };
}

const cases = JSON.parse(await readFile(process.argv[2], "utf8"));
console.log(JSON.stringify({
  messages: (cases.messages ?? []).map(({ hex: text }) => {
    const message = decode(bytes(text));
    return { fields: plain(message), hex: hex(encode(message)) };
  }),
  payloads: (cases.payloads ?? []).map(coded),
  shas: (cases.shas ?? []).map((text) => sha256Hex(bytes(text))),
  files: (cases.files ?? []).map((text) => hex(writeTensors(tensors(text)))),
  refused: (cases.refused ?? []).map((text) => {
    try {
      return String(decode(bytes(text)).type);
    } catch (error) {
      return `${error.name}: ${error.message}`;
    }
  }),
  damaged: (cases.damaged ?? []).map(({ codec, ratio, bits, reference, payload }) => {
    try {
      unpackUpdate(makeCodec(codec, ratio, bits), bytes(payload), tensors(reference));
      return "taken";
    } catch (error) {
      return error.name;
    }
  }),
}));
