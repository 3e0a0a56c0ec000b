/** What a device is asked to do, with the defaults of Python's `contracts/work`, and what of it this engine does not do. */
import { PLAIN_OPTIMIZER } from "./optim.mjs";
import { PLAIN_POLICY } from "./policies.mjs";

export const PLAIN_WORK = {
  policy: PLAIN_POLICY, optimizer: PLAIN_OPTIMIZER, steps: 0, epochs: 1, batch_size: 16, seq_len: 128, seed: 0, codec: "fp32",
  codec_ratio: 0, codec_bits: 0, rounds_before: 0, learns: "adapter", held_out: 0, cache_below: -1, frozen: "", rank: 0, rows: 0,
  rows_seed: 0, mask: "", personal: 0, personal_by: "importance", sums_bits: 0, histogram: false, micro_tokens: 0, most_norm: 0,
  noise: 0, sample_clip: 0, sample_noise: 0, sample_rate: 0, class_weights: "",
};
/** @typedef {typeof PLAIN_WORK} Work */

/** Work with its defaults filled in. @returns {Work} */
export const filledWork = (given = {}) => ({
  ...PLAIN_WORK, ...given, policy: { ...PLAIN_POLICY, ...given.policy }, optimizer: { ...PLAIN_OPTIMIZER, ...given.optimizer },
});

/** What is asked for that the JavaScript engine does not do: a reason to decline. @param {Work} work @returns {string[]} */
export function unsupported(work) {
  const found = [];
  if (work.learns !== "adapter") found.push(`learns ${work.learns}`);
  if (work.personal) found.push(`${work.personal} personal layers`);
  if (work.mask) found.push(`mask ${work.mask}`);
  if (work.rows) found.push(`rows ${work.rows}`);
  if (work.noise || work.most_norm) found.push("noise, or a norm that updates are scaled to");
  if (work.sample_clip) found.push("dp sample");
  if (work.class_weights) found.push("class weights");
  if (work.policy.protected && work.policy.protect === "effect") found.push("layers protected by their effect");
  return found;
}
