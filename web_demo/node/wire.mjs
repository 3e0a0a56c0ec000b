/**
 * `node wire.mjs CASES.json`: what the wire makes of given bytes, one line of JSON.
 * Cases: messages ({hex, fields}), payloads ({codec, ratio, bits, values, reference, payload, decodes}; tensors are safetensors in hexadecimal), shas ({hex}),
 * sequences ({codec, bits, rounds: {values, reference, bound}[]}: payloads one after another, with the memory of both sides), refused ({hex}), pulls ({manifest, events}: due, add or restart, with their times), dialogue (lines of tests/data/wire/dialogue.json), files (safetensors in hexadecimal).
 */
import { readFile } from "node:fs/promises";
import { inflateRawSync } from "node:zlib";
import { bytesOf, floats } from "../engine/arrays.mjs";
import { readTensors, writeTensors } from "../engine/safetensors.mjs";
import { hex, sha256Hex } from "../engine/sha256.mjs";
import { makeCodec, packUpdate, unpackUpdate, unpackWith } from "../wire/codecs/codecs.mjs";
import { spared } from "../device/lazy_upload.mjs";
import { decode, encode } from "../wire/messages.mjs";
import { Pull } from "../wire/pull.mjs";
import { Incoming, Outgoing } from "../wire/transfer.mjs";
import { unpack } from "../wire/msgpack.mjs";

const bytes = (text) => Uint8Array.from(Buffer.from(text, "hex"));
const tensors = (text) => readTensors(bytes(text)).arrays;
const plain = (value) =>
  value instanceof Uint8Array ? { hex: hex(value) } : Array.isArray(value) ? value.map(plain)
  : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, plain(v)])) : value;

/** A frame with its sections inflated: two deflates may differ in bytes, and what they hold may not. */
function opened(payload) {
  const frame = unpack(payload);
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
    sameBytes: hex(ours.payload) === payload, sameContent: opened(ours.payload) === opened(theirs), payload: hex(ours.payload),
    decoded: hex(writeTensors(found)), sameDecoded: Object.keys(found).every((n) => hex(bytesOf(found[n])) === hex(bytesOf(back[n]))),
    sameConveyed: Object.keys(back).every((n) => back[n].data.every((x, i) => x === ours.conveyed[n].data[i])),
  };
}

/** Payloads that each build on the one before; `bound` lets a payload repeat the last one. */
function sequenced({ codec, bits, rounds }) {
  const made = makeCodec(codec, 0, bits);
  let [memory, theirs] = [{}, {}];
  return rounds.map(({ values, reference, bound = 0 }) => {
    const held = tensors(reference), whole = packUpdate(made, tensors(values), held, { memory });
    const packed = spared(whole, made, held, { memory, bound, referenceSha256: "" }) ?? whole, found = unpackWith(made, packed.payload, held, theirs);
    [memory, theirs] = [packed.memory, found.memory];
    const isConveyed = Object.entries(found.values).every(([name, { data }]) => data.every((x, i) => x === packed.conveyed[name].data[i]));
    return { payload: hex(packed.payload), memory: hex(writeTensors(memory)), decoded: hex(writeTensors(found.values)), isConveyed };
  });
}

/** The device's side of the recorded round: what it would say, and whether it takes what it is told. */
function dialogue(lines) {
  const told = lines.map(({ bytes: text }) => decode(bytes(text))), offer = told.find(({ type }) => type === "offer"), said = [];
  const pull = new Pull(offer.adapter, { sizeBytesMax: 1e6, now: 0 });
  let lost = [1];
  for (let now = 0; !pull.done; now += 10) {
    const request = pull.due(now);
    if (!request) continue;
    said.push(hex(encode(request)));
    for (const chunk of told.filter((m) => m.type === "chunk" && m.sha256 === pull.sha256 && request.missing[m.index >> 3] & (1 << (m.index & 7))).slice(0, request.limit))
      if (!lost.includes(chunk.index)) pull.add(chunk, now);
    lost = [];
  }
  const held = readTensors(pull.content()).arrays, moved = { w: floats([600], Float32Array.from({ length: 600 }, (_, i) => (i % 7) / 8)) };
  const outgoing = new Outgoing(packUpdate(makeCodec("int8"), moved, held).payload, 500), update = told.find(({ type }) => type === "update");
  said.push(hex(encode({ ...update, payload: outgoing.manifest })));
  for (const request of told.filter((m) => m.type === "request" && m.sha256 === outgoing.manifest.sha256)) said.push(...outgoing.chunks(request).map((chunk) => hex(encode(chunk))));
  return { said, refused: refusals(offer.adapter, told.find(({ type }) => type === "chunk")) };
}

/** What a pull asks for at each event, and until when it waits. */
function pulled({ content, chunkBytes, events }) {
  const outgoing = new Outgoing(bytes(content), chunkBytes), pull = new Pull(outgoing.manifest, { sizeBytesMax: 1e9, now: 0 });
  return events.map(([kind, now, index]) => {
    let said = null;
    if (kind === "due") said = pull.due(now)?.missing ?? null;
    else if (kind === "restart") pull.restart(now);
    else pull.add({ sha256: pull.sha256, index, data: outgoing.content.subarray(index * chunkBytes, (index + 1) * chunkBytes) }, now);
    return [said && hex(said), pull.waitsUntil];
  });
}

/** What a receiver says to a chunk that was changed on its way, and to a manifest that cannot be. */
function refusals(manifest, chunk) {
  const changed = Uint8Array.from(chunk.data, (byte, i) => (i ? byte : byte ^ 1));
  const tries = [
    () => new Incoming(manifest, 1e6).add({ ...chunk, data: changed }), () => new Incoming(manifest, 1e6).add({ ...chunk, index: 99 }),
    () => new Incoming(manifest, 1e6).add({ ...chunk, data: chunk.data.subarray(1) }), () => new Incoming(manifest, 10), () => new Incoming({ ...manifest, sha256: "x" }, 1e6),
    () => new Incoming({ ...manifest, chunk_bytes: 0 }, 1e6), () => new Incoming(manifest, 1e6).content(),
  ];
  return tries.map((run) => {
    try {
      return String(run());
    } catch (error) {
      return `${error.name}: ${error.message}`;
    }
  });
}

const cases = JSON.parse(await readFile(process.argv[2], "utf8"));
console.log(JSON.stringify({
  messages: (cases.messages ?? []).map(({ hex: text }) => {
    const message = decode(bytes(text));
    return { fields: plain(message), hex: hex(encode(message)) };
  }),
  payloads: (cases.payloads ?? []).map(coded),
  sequences: (cases.sequences ?? []).map(sequenced),
  pulls: (cases.pulls ?? []).map(pulled),
  dialogue: cases.dialogue && dialogue(cases.dialogue),
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
