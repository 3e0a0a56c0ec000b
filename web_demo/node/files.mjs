/** Files of a folder, for Node. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";

/** @returns {import("../engine/artifact.mjs").ReadFile} */
export const reader = (folder) => async (name) => {
  const content = await readFile(join(folder, name));
  return new Uint8Array(content.buffer, content.byteOffset, content.length);
};
