/** What a device's owner lets an aggregator ask: floors and ceilings with the defaults of Python's `terms`, and what is behind an update. */
import { floats, halfToEven } from "../engine/arrays.mjs";
import { ConfigError } from "../engine/errors.mjs";

export const PLAIN_TERMS = { least_samples: 8, least_effective: 32, least_batch: 4, least_steps: 1, most_steps: 100000, most_batch: 1024, most_tokens: 8192, most_change: 1, tell_figures: true, secure_only: false };
/** @typedef {typeof PLAIN_TERMS} Terms */
/** The codec of an update that the aggregator reads only in a sum. */
export const MASKED = "masked";
const HELD_MAX = 64, RATE_MAX = 0.95;
const DENIED = "this device's owner does not allow it: ";

/** Raise ConfigError that lists every limit that an offer does not keep. @param {Terms} terms @param {import("../engine/work.mjs").Work} work */
export function checkTerms(terms, work, role, numSamples) {
  const found = [beyond("most_batch", work.batch_size, terms.most_batch), beyond("most_tokens", work.seq_len, terms.most_tokens)];
  if (terms.secure_only && role === "train" && work.codec !== MASKED) found.push("secure_only: the update would not be masked");
  if (role !== "train") found.push(below("least_samples", numSamples, terms.least_samples));
  else {
    const { samples, batch, steps } = behind(work, numUsed(work, numSamples, terms.least_batch));
    found.push(below("least_samples", samples, terms.least_samples), below("least_effective", samples, terms.least_effective),
      below("least_batch", batch, terms.least_batch), below("least_steps", steps, terms.least_steps), beyond("most_steps", steps, terms.most_steps));
  }
  const said = found.filter(Boolean);
  if (said.length) throw new ConfigError(DENIED + said.join("; "));
}

/** ConfigError for an update behind which, in effect, are too few samples. */
export function checkEffective(terms, samples) {
  const said = below("least_effective", Math.floor(samples), terms.least_effective);
  if (said) throw new ConfigError(DENIED + said);
}

const below = (limit, asked, least) => asked < least && `${limit}: ${asked} asked for, ${least} at least`;
const beyond = (limit, asked, most) => most && asked > most && `${limit}: ${asked} asked for, ${most} at most`;

/** The least of a device's data that stands behind an update, whatever an aggregator draws. */
export function behind(work, numSamples) {
  const size = Math.max(1, work.batch_size), rows = numSamples - held(work, numSamples), batches = Math.max(1, Math.ceil(rows / size));
  const short = rows - (batches - 1) * size, steps = work.steps || work.epochs * batches, { policy } = work;
  const share = policy.shape === "uniform" && !policy.protected ? policy.drop : RATE_MAX;
  const batch = policy.gates === "row" && policy.drop ? halfToEven((1 - share) * short) : short;
  return { samples: steps >= batches ? rows : Math.max(0, steps - 1) * size + short, batch, steps };
}

/** How many rows may train, so that no step has fewer than `least`: the spare ones are the last of the data. */
export function numUsed(work, numSamples, least) {
  if (numSamples <= work.batch_size) return numSamples;
  const isEven = (given, n) => {
    const short = (n - held(given, n)) % work.batch_size;
    return short === 0 || short >= least;
  };
  for (let n = numSamples; n > Math.floor(numSamples / 2); n--) if (isEven(work, n) && isEven({ ...work, held_out: 0 }, n)) return n;
  return numSamples;
}

function held(work, n) {
  return work.held_out && n >= 2 ? Math.min(Math.max(1, halfToEven(work.held_out * n)), Math.floor(n / 2), HELD_MAX) : 0;
}

/**
 * An update whose root mean square change is at most `most`; 0 for any.
 * @param {import("../engine/arrays.mjs").Arrays} values
 * @param {import("../engine/arrays.mjs").Arrays} reference
 */
export function clipped(values, reference, most) {
  let squares = 0, count = 0;
  for (const [name, { data }] of Object.entries(values)) {
    const from = reference[name].data;
    data.forEach((value, i) => (squares += (value - from[i]) ** 2));
    count += data.length;
  }
  const norm = Math.sqrt(squares), limit = most * Math.sqrt(count);
  if (!most || !Number.isFinite(norm) || norm <= limit) return { values, norm, scale: 1 };
  const scale = limit / norm;
  const moved = Object.entries(values).map(([name, { shape, data }]) => [name, floats(shape, data.map((value, i) => reference[name].data[i] + scale * (value - reference[name].data[i])))]);
  return { values: Object.fromEntries(moved), norm, scale };
}
