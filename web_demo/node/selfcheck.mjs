/** `node selfcheck.mjs ARTIFACT`: the golden step on onnxruntime-web, one line of JSON. */
import { openArtifact } from "../engine/artifact.mjs";
import { GOLDEN, selfcheck } from "../engine/golden.mjs";
import { reader } from "./files.mjs";
import { ort } from "./runtime.mjs";

const [folder, full] = process.argv.slice(2);
const artifact = await openArtifact(reader(folder), { where: folder, also: [GOLDEN] });
const report = await selfcheck(artifact, ort);
const { ok, worst, limit, tensors } = report;
console.log(JSON.stringify({ ok, worst, limit, count: Object.keys(tensors).length, ...(full ? { tensors } : {}) }));
process.exitCode = ok ? 0 : 1;
