/** Messages of the wire: their fields in order with bounds and defaults, to bytes and back; docs/protocol.md, "Fields". */
import { oneLine, WireError } from "../engine/errors.mjs";
import { Float, pack, unpack } from "./msgpack.mjs";

export const VERSION = 1, CHUNK_BYTES = 120 * 1024, MESSAGE_BYTES_MAX = 128 * 1024, TRANSFER_BYTES_MAX = 4 * 2 ** 30;
export const REASON_CHARS_MAX = 500, COUNT_MAX = 2 ** 31 - 1;
const FIGURE_MAX = 1e39, SEED_MAX = Number.MAX_SAFE_INTEGER, ASCII = /^[ -~]*$/;
const PRINTABLE = /^[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]*$/;

// A type turns a field into what is packed, and what was unpacked into a field; it throws a reason.
const refuse = (want, got) => {
  throw new WireError(`expected ${want}, got ${oneLine(String(got instanceof Map ? "a map" : got), 60)}`);
};
const int = (least, most) => ({
  out: (v) => v,
  in: (v) => (Number.isSafeInteger(v) && v >= least && v <= most ? v : refuse(`an integer from ${least} to ${most}`, v)),
});
const float = (least = -Infinity, most = Infinity) => ({
  out: (v) => new Float(v),
  in: (v) => (typeof v === "number" && !(v < least || v > most) ? v : refuse(`a number from ${least} to ${most}`, v)),
});
const word = (most = 64) => ({ out: (v) => v, in: (v) => (typeof v === "string" && v.length <= most && ASCII.test(v) ? v : refuse(`at most ${most} printable characters`, v)) });
const bytes = (most, least = 0) => ({
  out: (v) => v,
  in: (v) => (v instanceof Uint8Array && v.length <= most && v.length >= least ? v : refuse(`at most ${most} bytes`, v)),
});
const bool = { out: (v) => v, in: (v) => (typeof v === "boolean" ? v : refuse("true or false", v)) };
const plain = (most) => ({ out: (v) => v, in: (v) => (typeof v === "string" && [...v].length <= most && PRINTABLE.test(v) ? v : refuse(`text of at most ${most} characters`, v)) });
const text = { out: (v) => v, in: (v) => (typeof v === "string" ? oneLine(v, REASON_CHARS_MAX) : refuse("text", v)) };
const list = (type, most) => ({
  out: (v) => v.map(type.out),
  in: (v) => (Array.isArray(v) && v.length <= most ? v.map(type.in) : refuse(`a list of at most ${most}`, v)),
});
const stats = {
  out: (v) => new Map(Object.entries(v).map(([name, value]) => [name, new Float(value)])),
  in: (v) => (v instanceof Map && v.size <= 32 ? Object.fromEntries([...v].map(([n, x]) => [NAME.in(n), float().in(x)])) : refuse("at most 32 figures", v)),
};
const struct = (fields, { isLean = false } = {}) => ({
  fields,
  out: (v) => new Map(fields.filter(([n, , d]) => !isLean || v[n] !== d).map(([n, type, d]) => [n, type.out(v[n] ?? d)])),
  in: (v) => (v instanceof Map ? filled(fields, v) : refuse("a map", v)),
});

function filled(fields, given) {
  return Object.fromEntries(fields.map(([name, type, absent]) => {
    if (!given.has(name)) return [name, absent === undefined ? refuse(name, "nothing") : type.fields ? filled(type.fields, new Map()) : structuredClone(absent)];
    try {
      return [name, type.in(given.get(name))];
    } catch (error) {
      throw new WireError(`${name}: ${error.message}`);
    }
  }));
}

const NAME = word(), TASK = word(128), COUNT = int(0, COUNT_MAX), HELD = int(-1, COUNT_MAX), KEY = bytes(32, 32);
const LONG = plain(4096), FREE = float(), WHOLE = int(Number.MIN_SAFE_INTEGER, SEED_MAX), V = ["v", WHOLE, VERSION];

const POLICY = struct([
  ["name", NAME, "full"], ["drop", FREE, 0], ["shape", NAME, "uniform"], ["period", WHOLE, 0], ["schedule", NAME, "constant"],
  ["horizon", WHOLE, 0], ["protected", WHOLE, 0], ["protect", NAME, "ends"], ["gates", NAME, "batch"], ["width", WHOLE, 0], ["first", WHOLE, 0],
]);
const OPTIMIZER = struct([
  ["name", NAME, "adamw"], ["lr", FREE, 2e-3], ["weight_decay", FREE, 0], ["warmup_steps", WHOLE, 0], ["decay", NAME, "constant"],
  ["clip_norm", FREE, 0], ["proximal", FREE, 0],
]);
const WORK = struct([
  ["policy", POLICY, {}], ["optimizer", OPTIMIZER, {}], ["steps", WHOLE, 0], ["epochs", WHOLE, 1], ["batch_size", WHOLE, 16],
  ["seq_len", WHOLE, 128], ["seed", WHOLE, 0], ["codec", NAME, "fp32"], ["codec_ratio", FREE, 0], ["codec_bits", WHOLE, 0],
  ["rounds_before", WHOLE, 0], ["learns", NAME, "adapter"], ["held_out", FREE, 0], ["cache_below", WHOLE, -1], ["frozen", NAME, ""],
  ["rank", WHOLE, 0], ["rows", WHOLE, 0], ["rows_seed", WHOLE, 0], ["mask", NAME, ""], ["personal", WHOLE, 0],
  ["personal_by", NAME, "importance"], ["sums_bits", WHOLE, 0], ["histogram", bool, false], ["micro_tokens", WHOLE, 0],
  ["most_norm", FREE, 0], ["noise", FREE, 0], ["sample_clip", FREE, 0], ["sample_noise", FREE, 0], ["sample_rate", FREE, 0],
  ["class_weights", LONG, ""],
]);
const SECONDS = float(0, 1e9), LEFT = float(-1e9, 1e9), MEGABYTES = float(0, 1e9);
const FIGURES = struct([["round", COUNT], ["devices", COUNT], ["seconds", SECONDS, 0], ["mb_down", MEGABYTES, 0], ["mb_up", MEGABYTES, 0], ["measured", stats, {}]]);
const counts = {
  out: (v) => new Map(Object.entries(v)),
  in: (v) => (v instanceof Map && v.size <= 256 ? Object.fromEntries([...v].map(([n, x]) => [NAME.in(n), COUNT.in(x)])) : refuse("at most 256 counts", v)),
};
const GRID = struct([["bits", int(0, 24), 0], ["weight_bits", int(0, 20), 0], ["summands", int(0, 100000), 0], ["limit", float(0, 1e6), 0]], { isLean: true });
const MANIFEST = struct([["size_bytes", int(0, TRANSFER_BYTES_MAX)], ["chunk_bytes", COUNT], ["chunk_digests", bytes(64 * 1024)], ["sha256", NAME]]);
const VOUCHED = [["certificate", bytes(4096), new Uint8Array()], ["signature", bytes(1024), new Uint8Array()]];
const SHARE = struct([["place", COUNT], ["data", bytes(128)]]), PEER = struct([["place", COUNT], ["device_id", NAME], ["mask_key", KEY], ["share_key", KEY], ...VOUCHED]);
const SHARES = list(SHARE, 513), PLACES = list(COUNT, 513);
const TASKED = [["job", NAME], ["task_id", TASK, ""], ["round", COUNT]];
const MASKED = [["job", NAME], ["task_id", TASK], ["round", COUNT]];

/** Fields of each message by its type. */
const MESSAGES = {
  hello: [V, ["device_id", NAME], ["artifact", NAME], ["role", NAME, "train"], ["num_samples", COUNT, 0], ["version", HELD, -1], ["holds", NAME, ""],
    ["mask", NAME, ""], ["original", NAME, ""], ["listens", bool, false], ["connection", NAME, ""]],
  offer: [V, ...TASKED, ["version", COUNT], ["role", NAME], ["work", WORK], ["adapter", MANIFEST], ["adapter_sha256", NAME, ""], ["down_codec", NAME, "full"],
    ["down_ratio", float(0, 1), 0], ["down_bits", COUNT, 0], ["reference", NAME, ""], ["memory", NAME, ""], ["lazy", float(0, FIGURE_MAX), 0],
    ["is_exact", bool, true], ["mask_sha256", NAME, ""], ["mask_bytes", COUNT, 0], ["grid", GRID, {}], ["mask_group", NAME, ""],
    ["shared", NAME, ""], ["deadline_s", SECONDS]],
  update: [V, ["device_id", NAME], ...TASKED, ["version", COUNT], ["codec", NAME], ["num_samples", COUNT], ["payload", MANIFEST], ["stats", stats, {}],
    ["histogram", list(WHOLE, 4096), []]],
  report: [V, ["device_id", NAME], ...TASKED, ["version", COUNT], ["loss", FREE], ["accuracy", FREE], ["num_samples", COUNT]],
  decline: [V, ["device_id", NAME], ...TASKED, ["reason", text], ["cause", NAME, ""]],
  verdict: [V, ...TASKED, ["digest", NAME, ""], ["accepted", bool], ["reason", text, ""]],
  request: [V, ["sha256", NAME], ["missing", bytes(1024)], ["limit", COUNT, 16], ["shared", NAME, ""]],
  chunk: [V, ["sha256", NAME], ["index", COUNT], ["data", bytes(CHUNK_BYTES)]],
  finished: [V, ["job", NAME], ["reason", text, ""], ["is_error", bool, false]],
  device_status: [V, ["device_id", NAME], ["online", bool], ["paused", text, ""], ["session", NAME, ""], ["phase", NAME, ""], ["round", COUNT, 0],
    ["step", COUNT, 0], ["steps", COUNT, 0], ["step_s", SECONDS, 0], ["left_s", LEFT, 0], ["memory_mb", MEGABYTES, 0], ["temperature_c", float(-273.15, 1000), 0],
    ["mb_sent", MEGABYTES, 0], ["mb_received", MEGABYTES, 0], ["software", NAME, ""], ["said", text, ""]],
  aggregator_status: [V, ["job", NAME], ["session", NAME], ["online", bool], ["round", COUNT], ["version", COUNT], ["finished", bool, false],
    ["tell_every_s", SECONDS, 0]],
  look: [V, ["rounds_from", COUNT, 0]],
  view: [V, ["job", NAME], ["session", NAME], ["software", NAME, ""], ["round", COUNT], ["num_rounds", COUNT], ["version", COUNT], ["is_open", bool],
    ["left_s", LEFT, 0], ["num_pending", COUNT, 0], ["num_accepted", COUNT, 0], ["num_refused", COUNT, 0], ["pending", list(NAME, 256), []],
    ["left_out", counts, {}], ["dropped", COUNT, 0], ["figures", list(FIGURES, 256), []]],
  mask_keys: [V, ["device_id", NAME], ...MASKED, ["mask_key", KEY], ["share_key", KEY], ["seed_digest", KEY], ...VOUCHED],
  mask_group: [V, ...MASKED, ["group", NAME], ["place", COUNT], ["mask_key", KEY], ["threshold", COUNT], ["peers", list(PEER, 512)]],
  mask_shares: [V, ["device_id", NAME], ...MASKED, ["group", NAME], ["shares", SHARES]],
  mask_inbox: [V, ...MASKED, ["group", NAME], ["shares", SHARES]],
  mask_ask: [V, ...MASKED, ["group", NAME], ["delivered", PLACES], ["dropped", PLACES]],
  mask_reveal: [V, ["device_id", NAME], ...MASKED, ["group", NAME], ["seeds", SHARES], ["secrets", SHARES]],
};
/** Messages that leave away what has its default, but for `v`. */
const LEAN = new Set(["device_status"]);
export const TYPES = Object.keys(MESSAGES);

/** @param {{type: string}} message its fields beside `type`; those left out are at their defaults @returns {Uint8Array} */
export function encode(message) {
  const fields = MESSAGES[message.type];
  if (!fields) throw new WireError(`no message ${oneLine(message.type)}`);
  const told = LEAN.has(message.type) ? fields.filter(([name, , absent]) => name === "v" || absent === undefined || (message[name] ?? absent) !== absent) : fields;
  return pack(new Map([["type", message.type], ...told.map(([name, type, absent]) => [name, type.out(message[name] ?? absent)])]));
}

/** Bytes to a message; WireError if it is too large, malformed, beyond a bound, of an unknown type or another version. */
export function decode(content) {
  if (content.length > MESSAGE_BYTES_MAX) throw new WireError(`message of ${content.length} bytes; at most ${MESSAGE_BYTES_MAX} are taken`);
  const given = unpack(content), type = given instanceof Map && given.get("type");
  if (!Object.hasOwn(MESSAGES, type || "")) throw new WireError(`malformed message: no type ${oneLine(String(type), 60)}`);
  const message = { type, ...filled(MESSAGES[type], given) };
  if (message.v !== VERSION) throw new WireError(`protocol version ${message.v}; this side speaks ${VERSION}`);
  return message;
}

/** Identity of the task that a device's message answers. */
export function taskIdOf(message) {
  if (message.task_id) return message.task_id;
  return message.type === "report" ? `evaluate-${message.version}-${message.device_id}` : `train-${message.round}-${message.device_id}`;
}

export const topicOf = (job, deviceId, leaf) => `fleetune/v1/${job}/device/${deviceId}/${leaf}`;
export const aggregatorTopic = (job) => `fleetune/v1/${job}/aggregator/status`;
/** Whether a text may stand in a topic. */
export const isName = (name) => /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(name);
