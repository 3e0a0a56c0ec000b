/**
 * What a device keeps. One interface, two makers: memory here, IndexedDB in `indexed_store.mjs`.
 *
 * @typedef {Object} Store values are what a structured clone takes; a change is kept for good, all of it or none, when its promise ends
 * @property {(key: string) => Promise<unknown>} get undefined if there is none
 * @property {(prefix: string) => Promise<string[]>} keys in the order of code points
 * @property {(changes: Record<string, unknown>) => Promise<void>} set undefined deletes
 * @property {() => Promise<void>} clear everything
 */

/** A store that ends with its process. @returns {Store} */
export function memoryStore() {
  const held = new Map();
  return {
    get: async (key) => structuredClone(held.get(key)),
    keys: async (prefix) => [...held.keys()].filter((key) => key.startsWith(prefix)).sort(),
    set: async (changes) => {
      const copies = Object.entries(changes).map(([key, value]) => [key, structuredClone(value)]);
      for (const [key, value] of copies) value === undefined ? held.delete(key) : held.set(key, value);
    },
    clear: async () => held.clear(),
  };
}
