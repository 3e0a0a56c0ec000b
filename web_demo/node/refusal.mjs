/** `node refusal.mjs ARTIFACT`: what is said of an artifact that cannot be opened, one line of JSON. */
import { openArtifact } from "../engine/artifact.mjs";
import { reader } from "./files.mjs";

const [folder] = process.argv.slice(2);
const { name, message } = await openArtifact(reader(folder), { where: "artifact" }).catch((error) => error);
console.log(JSON.stringify({ name: name ?? "", message: message ?? "" }));
