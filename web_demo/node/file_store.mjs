/** A store in one file, written anew and renamed with each change: for a device in Node that is killed and started again. */
import { open, readFile, rename } from "node:fs/promises";
import { deserialize, serialize } from "node:v8";

/** @returns {Promise<import("../device/store.mjs").Store>} */
export async function fileStore(path) {
  const held = new Map(await readFile(path).then(deserialize, (error) => (error.code === "ENOENT" ? [] : Promise.reject(error))));
  const write = async () => {
    const file = await open(`${path}.part`, "w");
    await file.writeFile(serialize([...held]));
    await file.sync();
    await file.close();
    await rename(`${path}.part`, path);
  };
  return {
    get: async (key) => structuredClone(held.get(key)),
    keys: async (prefix) => [...held.keys()].filter((key) => key.startsWith(prefix)).sort(),
    set: async (changes) => {
      for (const [key, value] of Object.entries(changes)) value === undefined ? held.delete(key) : held.set(key, structuredClone(value));
      await write();
    },
    clear: async () => (held.clear(), write()),
  };
}
