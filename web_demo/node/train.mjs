/**
 * `node train.mjs OPTIONS.json`: runs as `fleetune train` makes them, one line of JSON with a list.
 * Options: artifact (folder), runs: each with data (file), work, and perhaps savedLayers, copies (arrays in and out of WebAssembly), bakes, stopAt (step at which it is saved and
 * taken up again), adapter (file to write), evaluate.
 */
import { readFile, writeFile } from "node:fs/promises";
import { openArtifact } from "../engine/artifact.mjs";
import { Engine } from "../engine/engine.mjs";
import { evaluate } from "../engine/evaluation.mjs";
import { writeTensors } from "../engine/safetensors.mjs";
import { TextReader } from "../engine/text.mjs";
import { Trainer } from "../engine/trainer.mjs";
import { filledWork } from "../engine/work.mjs";
import { reader } from "./files.mjs";
import { ort, plain } from "./runtime.mjs";

const { artifact: folder, runs } = JSON.parse(await readFile(process.argv[2], "utf8"));
const artifact = await openArtifact(reader(folder), { where: folder }), texts = new TextReader(artifact), found = [];
for (const run of runs) found.push(await trained(run));
console.log(JSON.stringify(found));

async function trained(run) {
  const work = filledWork(run.work), engine = new Engine(artifact, run.copies ? plain : ort, { savedLayers: run.savedLayers ?? null, bakes: run.bakes });
  const dataset = texts.labelled(await readFile(run.data, "utf8"), run.data, work.seq_len);
  let trainer = new Trainer(engine, dataset, work, artifact.adapter());
  const cpuMs = [];
  while (!trainer.done) {
    if (trainer.stepIndex === run.stopAt) {
      const saved = trainer.save();
      trainer = new Trainer(engine, dataset, work, artifact.adapter());
      trainer.restore(saved);
    }
    const before = process.cpuUsage();
    await trainer.step();
    const { user, system } = process.cpuUsage(before);
    cpuMs.push((user + system) / 1000);
  }
  const evaluation = run.evaluate ? await evaluate(engine, dataset, trainer.adapter) : null;
  if (run.adapter) await writeFile(run.adapter, writeTensors(trainer.adapter));
  await engine.close();
  return {
    losses: trainer.history.map((step) => step.loss), effective: trainer.effectiveSamples, figures: trainer.figures, evaluation, cpuMs,
    rssKb: process.resourceUsage().maxRSS,
  };
}
