/** What is sent of an update whose innovation is worth no upload: that the last one counts again; as Python's `agent/lazy_upload`. */
import { sameShape } from "../engine/arrays.mjs";
import { packUpdate } from "../wire/codecs/codecs.mjs";
import { isLazy, LAST, repeating, SKIPS_MAX, skipsOf } from "../wire/codecs/innovation.mjs";
import { asKind, chainOf, ofKind, RESIDUAL } from "../wire/codecs/memory.mjs";

/**
 * What goes in the place of `packed`; null if that is to be sent.
 * @param {ReturnType<packUpdate>} packed
 * @param {ReturnType<import("../wire/codecs/codecs.mjs").makeCodec>} codec
 * @param {import("../engine/arrays.mjs").Arrays} reference
 * @param {{memory: import("../engine/arrays.mjs").Arrays, bound: number, referenceSha256: string}} given `bound`: the offer's `lazy`
 */
export function spared(packed, codec, reference, { memory, bound, referenceSha256 }) {
  if (!bound || !codec.remembers) return null;
  const before = ofKind(LAST, memory), after = ofKind(LAST, packed.memory), names = Object.keys(packed.conveyed).sort();
  const isKnown = names.length === Object.keys(before).length && names.every((name) => before[name] && sameShape(before[name].shape, reference[name].shape));
  if (!chainOf(memory) || !isKnown || skipsOf(memory) >= SKIPS_MAX) return null;
  const step = names.map((name) => after[name].data.reduce((sum, x, i) => sum + (x - before[name].data[i]) ** 2, 0)).reduce((sum, x) => sum + x, 0);
  const owed = ofKind(RESIDUAL, memory), left = ofKind(RESIDUAL, packed.memory);
  if (!isLazy(step, norm2(owed) + norm2(left), bound)) return null;
  const told = Object.fromEntries(names.map((name) => [name, reference[name]])), isOwed = ([key]) => key.startsWith(`${RESIDUAL}/`);
  const without = (kept) => Object.fromEntries(Object.entries(kept).filter((entry) => !isOwed(entry)));
  const found = packUpdate(repeating(codec), told, reference, { memory: without(memory), referenceSha256 });
  // What was owed before is owed still: nothing of this update is.
  return { ...found, memory: { ...without(found.memory), ...asKind(RESIDUAL, owed) } };
}

const norm2 = (arrays) => Object.values(arrays).reduce((sum, { data }) => data.reduce((s, x) => s + x * x, sum), 0);
