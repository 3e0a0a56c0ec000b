/** The store of a page, in IndexedDB: it outlives the tab, and each change is one transaction. */
import { oneLine, StateError } from "../engine/errors.mjs";

const TABLE = "kept";

/** @param {string} name of the database @returns {Promise<import("./store.mjs").Store>} StateError where storage is forbidden or full */
export async function indexedStore(name) {
  if (!globalThis.indexedDB) throw new StateError("this browser keeps nothing for this page; leave private browsing, or allow storage");
  const opening = indexedDB.open(name, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(TABLE);
  const database = await ended(opening, "opened");
  database.onversionchange = () => database.close();
  const table = (mode) => database.transaction(TABLE, mode, mode === "readwrite" ? { durability: "strict" } : {}).objectStore(TABLE);
  return {
    get: (key) => ended(table("readonly").get(key), "read"),
    keys: (prefix) => ended(table("readonly").getAllKeys(IDBKeyRange.bound(prefix, `${prefix}\uffff`)), "read"),
    set: (changes) => written(table("readwrite"), (kept) => {
      for (const [key, value] of Object.entries(changes)) value === undefined ? kept.delete(key) : kept.put(value, key);
    }),
    clear: () => written(table("readwrite"), (kept) => kept.clear()),
  };
}

function ended(request, what) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(problem(what, request.error));
  });
}

/** Kept only when the transaction is complete. */
function written(table, change) {
  return new Promise((resolve, reject) => {
    table.transaction.oncomplete = () => resolve();
    table.transaction.onerror = table.transaction.onabort = () => reject(problem("written", table.transaction.error));
    try {
      change(table);
    } catch (error) {
      reject(problem("written", error));
    }
  });
}

function problem(what, error) {
  const isFull = error?.name === "QuotaExceededError";
  return new StateError(isFull ? "storage is full: delete what this page keeps, or make room on the disk" : `storage cannot be ${what}; allow this page to keep data, or leave private browsing (${oneLine(error?.message ?? "blocked by another tab").replace(/\.$/, "")})`);
}
