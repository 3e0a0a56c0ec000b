/**
 * `node guard.mjs CASES.json`: what a device with pinned keys takes of a list of messages, one line of JSON with a row for each.
 * Cases: trust (PEM), job, device, role, steps: {topic, hex, now}, {restart: true}, {close: true}; and pems, for each of which it is said what is wrong.
 */
import { readFile } from "node:fs/promises";
import { Guard } from "../device/guard.mjs";
import { memoryStore } from "../device/store.mjs";
import { trustedOf } from "../device/trusted.mjs";
import { aggregatorTopic } from "../wire/messages.mjs";

const { trust, job, device: deviceId, role, steps, pems } = JSON.parse(await readFile(process.argv[2], "utf8")), facts = memoryStore(), told = [];
const home = { job, deviceId, role, facts, trusted: await trustedOf(trust), aggregator: aggregatorTopic(job), onEvent: ({ text }) => told.push(text) };

async function opened() {
  const guard = new Guard(home);
  await guard.open();
  return guard;
}

let guard = await opened();
const rows = [];
for (const { topic, hex, now, restart, close } of steps) {
  if (restart) guard = await opened();
  if (close) await guard.close();
  if (!topic) continue;
  const row = { taken: "", late: "", declined: "" }, decline = (offer, reason) => (row.declined = reason);
  try {
    const message = await guard.read(topic, Uint8Array.from(Buffer.from(hex, "hex")), now, decline);
    row.taken = message?.type ?? "";
    if (row.taken === "offer") row.late = await guard.admits(message);
  } catch (error) {
    row.wrong = `${error.name}: ${error.message}`;
  }
  rows.push({ ...row, told: told.splice(0).join("") });
}
const refused = await Promise.all((pems ?? []).map((pem) => trustedOf(pem).then(() => "", (error) => `${error.name}: ${error.message}`)));
delete globalThis.crypto;
Object.defineProperty(globalThis, "crypto", { value: undefined });
console.log(JSON.stringify({ rows, refused, without: await trustedOf(trust).catch((error) => error.message) }));
