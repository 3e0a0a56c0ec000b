/** The golden step: what torch recorded at export, replayed here tensor by tensor, saved and recomputed. */
import { array } from "./arrays.mjs";
import { ArtifactError, oneLine } from "./errors.mjs";
import { dropping } from "./plans.mjs";
import { asFloats, readTensors } from "./safetensors.mjs";
import { Engine } from "./engine.mjs";

export const GOLDEN = "golden.safetensors";
export const LIMIT = 1e-4;
/** Of relative L2 error, with int8 weights: as Python's `selfcheck` has it, and says why. */
export const INT8_LIMIT = 5e-2;
const NOISE_STEP = 2 ** -11;

/**
 * @param {import("./artifact.mjs").Artifact} artifact opened with `also: [GOLDEN]`
 * @returns {Promise<{ok: boolean, worst: number, limit: number, tensors: Record<string, number>}>} errors by plan and tensor
 */
export async function selfcheck(artifact, ort, options = {}) {
  const { arrays, metadata } = readTensors(artifact.file(GOLDEN)), plans = plansOf(metadata);
  const isInt8 = artifact.manifest.base_dtype === "int8";
  const [measure, limit] = isInt8 ? [relativeDistance, INT8_LIMIT] : [relativeError, LIMIT];
  const batch = part(arrays, "batch."), adapter = recordedAdapter(artifact, arrays), tensors = {};
  for (const savedLayers of [null, 0]) {
    const engine = new Engine(artifact, ort, { ...options, savedLayers });
    for (const [name, dropped] of Object.entries(plans)) {
      const plan = dropping(artifact.manifest.layers.length, dropped);
      const { loss, logits, grads } = await engine.step(batch, plan, adapter, { keepLogits: true });
      const expected = part(arrays, `${name}.`), found = { loss: array("float32", [], Float32Array.of(loss)) };
      if (expected.logits) found.logits = logits;
      for (const [tensor, grad] of Object.entries(grads)) found[`grad.${tensor}`] = grad;
      for (const tensor of new Set([...Object.keys(expected), ...Object.keys(found)])) {
        const label = `${name}.${savedLayers === 0 ? "recompute." : ""}${tensor}`;
        tensors[label] = expected[tensor] && found[tensor] ? measure(found[tensor].data, expected[tensor].data) : Infinity;
      }
    }
    await engine.close();
  }
  const worst = Math.max(...Object.values(tensors));
  return { ok: worst <= limit, worst, limit, tensors };
}

/** The recorded batch and adapter, and the first of the recorded plans. @param {import("./artifact.mjs").Artifact} artifact opened with `also: [GOLDEN]` */
export function recordedStep(artifact) {
  const { arrays, metadata } = readTensors(artifact.file(GOLDEN)), [dropped] = Object.values(plansOf(metadata));
  return { batch: part(arrays, "batch."), adapter: recordedAdapter(artifact, arrays), plan: dropping(artifact.manifest.layers.length, dropped) };
}

/** The adapter of the golden step: the artifact's own with its noise. */
function recordedAdapter(artifact, arrays) {
  const noise = part(arrays, "noise."), own = artifact.adapter();
  if (!Object.keys(noise).length) return part(arrays, "adapter.");
  return Object.fromEntries(Object.entries(noise).map(([name, { shape, data }]) => {
    const moved = Float32Array.from(own[name].data, (value, i) => value + Math.fround(Number(data[i]) * NOISE_STEP));
    return [name, array("float32", shape, moved)];
  }));
}

function plansOf(metadata) {
  try {
    const plans = JSON.parse(metadata.plans ?? "{}");
    if (Object.values(plans).every((dropped) => Array.isArray(dropped)) && Object.keys(plans).length) return plans;
  } catch (error) {
    throw new ArtifactError(`${GOLDEN}: its plans cannot be read: ${oneLine(error.message)}; export again`);
  }
  throw new ArtifactError(`${GOLDEN}: holds no recorded step; export again`);
}

const part = (arrays, prefix) =>
  Object.fromEntries(Object.entries(arrays).filter(([n]) => n.startsWith(prefix)).map(([n, a]) => [n.slice(prefix.length), a.dtype === "float16" ? asFloats(a) : a]));

/** Largest difference over the largest recorded magnitude. */
export function relativeError(found, expected) {
  if (found.length !== expected.length) return Infinity;
  let worst = 0, scale = 0;
  for (let i = 0; i < found.length; i++) {
    if (!Number.isFinite(found[i])) return Infinity;
    worst = Math.max(worst, Math.abs(found[i] - expected[i]));
    scale = Math.max(scale, Math.abs(expected[i]));
  }
  return scale ? worst / scale : worst;
}

/** Norm of the difference over the norm of what was recorded. */
export function relativeDistance(found, expected) {
  if (found.length !== expected.length) return Infinity;
  let off = 0, norm = 0;
  for (let i = 0; i < found.length; i++) {
    if (!Number.isFinite(found[i])) return Infinity;
    off += (found[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return Math.sqrt(off) / (Math.sqrt(norm) || 1);
}
