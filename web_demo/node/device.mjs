/**
 * `node device.mjs OPTIONS.json`: a device in Node; its events as lines of JSON, the last one its report.
 * Options: artifact, data, url (ws://…), job, id, and perhaps state (file), role, terms, helloS, cutAt (events "KIND" after which the connection is cut once),
 * username, password, trust (PEM file of the aggregator's public keys), certificate and key (its own), maskAuthority (who must have signed others'; PEM files), leaves (it is killed with its first update made and not sent).
 */
import { readFile } from "node:fs/promises";
import mqtt from "mqtt";
import { Agent } from "../device/agent.mjs";
import { Bench } from "../device/bench.mjs";
import { Home } from "../device/home.mjs";
import { live } from "../device/live.mjs";
import { memoryStore } from "../device/store.mjs";
import { openArtifact } from "../engine/artifact.mjs";
import { Engine } from "../engine/engine.mjs";
import { FleetuneError } from "../engine/errors.mjs";
import { trustedOf } from "../device/trusted.mjs";
import { openAuthorities, openVoucher } from "../wire/sums/vouching.mjs";
import { fileStore } from "./file_store.mjs";
import { reader } from "./files.mjs";
import { ort } from "./runtime.mjs";

const options = JSON.parse(await readFile(process.argv[2], "utf8")), cuts = new Set(options.cutAt ?? []), say = (line) => console.log(JSON.stringify(line));
try {
  const artifact = await openArtifact(reader(options.artifact), { where: options.artifact });
  const trusted = options.trust ? await trustedOf(await readFile(options.trust, "utf8")) : null;
  await trusted?.checkArtifact(artifact, await reader(options.artifact)("manifest.sig").catch(() => null));
  const [certificate, key, authority] = await Promise.all(["certificate", "key", "maskAuthority"].map((name) => options[name] && readFile(options[name], "utf8")));
  const voucher = certificate ? await openVoucher(certificate, key, { deviceId: options.id }) : null, authorities = authority ? openAuthorities(authority, options.maskAuthority) : null;
  const store = options.state ? await fileStore(options.state) : memoryStore();
  const bench = new Bench(new Engine(artifact, ort), { content: await readFile(options.data, "utf8"), name: options.data });
  const home = new Home({ deviceId: options.id, job: options.job, artifact, role: options.role, store, trusted, voucher, authorities, terms: options.terms, helloS: options.helloS ?? 30, checkpointEvery: options.checkpointEvery,
    onEvent: (event) => {
      say(event);
      if (cuts.delete(event.kind)) home.link.cut();
    } });
  const agent = new Agent(home, bench), stop = new AbortController();
  if (options.leaves) agent.deliveries.put = () => process.kill(process.pid, "SIGKILL");
  process.on("SIGTERM", () => stop.abort());
  const ended = await live({ mqtt, ...options, reconnectS: [0.2, 2], home, agent, signal: stop.signal });
  say({ kind: "ended", text: ended, unwanted: agent.isUnwanted, connections: home.link.connections, left: (await store.get(home.key("left_log"))) ?? [] });
  process.exit(agent.isUnwanted ? 1 : 0);
} catch (error) {
  say({ kind: "failed", name: error.name, text: error.message });
  if (!(error instanceof FleetuneError)) console.error(error);
  process.exit(1);
}
