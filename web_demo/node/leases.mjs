/**
 * `node leases.mjs ARTIFACT`: one line of JSON. How many tensors of onnxruntime are alive after each kind of pass (`alive`), and how many bytes
 * a step copied into its memory (`copied`).
 */
import { openArtifact } from "../engine/artifact.mjs";
import { Engine } from "../engine/engine.mjs";
import { GOLDEN, recordedStep } from "../engine/golden.mjs";
import { BYPASS, DROP, FORWARD, TRAIN } from "../engine/plans.mjs";
import { reader } from "./files.mjs";
import { ort } from "./runtime.mjs";

const [folder] = process.argv.slice(2), artifact = await openArtifact(reader(folder), { where: folder, also: [GOLDEN] });
const { batch, adapter, plan } = recordedStep(artifact), engine = new Engine(artifact, ort), alive = {};
await engine.step(batch, plan, adapter);
const { module } = ort.loaded, [label] = artifact.manifest.inputs.filter(({ name }) => name === "labels").map(({ name }) => name);
let count = 0, copied = 0;
const { _OrtCreateTensor: create, _OrtReleaseTensor: release, _OrtRun: start, _malloc: allocate } = module;
Object.assign(module, {
  _malloc: (size) => ((copied += size), allocate(size)),
  _OrtCreateTensor: (...given) => (count++, create(...given)),
  _OrtReleaseTensor: (value) => (count--, release(value)),
  _OrtRun(...given) {
    const code = start(...given);
    if (!code) count += given[5];
    return code;
  },
});
const rows = batch[label].shape[0], full = plan.map(() => TRAIN), { [label]: _, ...features } = batch;
const PASSES = {
  step: () => engine.step(batch, full, adapter),
  "lower layers forward only": () => engine.step(batch, full.map((mode, i) => (i < full.length - 1 ? FORWARD : mode)), adapter),
  "a layer dropped": () => engine.step(batch, full.map((mode, i) => (i ? mode : DROP)), adapter),
  "a layer gone around": () => engine.step(batch, full.map((mode, i) => (i ? mode : BYPASS)), adapter),
  "gates by row": () => engine.step(batch, full, adapter, { gates: full.map((_, i) => [...Array(rows).keys()].filter((row) => row >= i)) }),
  evaluation: () => engine.evaluate(batch, adapter),
  prediction: () => engine.predict(features, adapter),
  "an id without a row": () => engine.step({ ...batch, input_ids: { ...batch.input_ids, data: batch.input_ids.data.map(() => 1000000n) } }, full, adapter),
};
await PASSES.step();
const found = { alive, copied };
for (const [name, pass] of Object.entries(PASSES)) {
  count = 0;
  const said = await pass().then(() => "", (error) => `${error.name}: ${error.message}`);
  alive[name] = said ? `${count} ${said}` : count;
}
console.log(JSON.stringify(found));
