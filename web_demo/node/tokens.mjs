/** `node tokens.mjs CASES.json`: token ids and batches of a data set, one line of JSON. Cases: artifact, texts, seqLen, files ({name, content}). */
import { readFile } from "node:fs/promises";
import { openArtifact } from "../engine/artifact.mjs";
import { TextReader } from "../engine/text.mjs";
import { reader } from "./files.mjs";

const cases = JSON.parse(await readFile(process.argv[2], "utf8")), artifact = await openArtifact(reader(cases.artifact)), reads = new TextReader(artifact);
const one = (run) => {
  try {
    return run();
  } catch (error) {
    return `${error.name}: ${error.message}`;
  }
};
const rowsOf = ({ columns, lengths }) => ({ ids: columns.input_ids.rows.map((row) => [...row]), types: columns.token_type_ids?.rows.map((row) => [...row]), lengths, labels: columns.labels?.values });
console.log(JSON.stringify({
  texts: rowsOf(reads.plain(cases.texts, cases.seqLen)),
  files: (cases.files ?? []).map(({ name, content }) => one(() => rowsOf(reads.labelled(content, name, cases.seqLen)))),
}));
