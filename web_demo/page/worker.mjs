/** The worker behind the page: the engine, local runs, the device of a job. It hears {id, do, …} and says {id, …} or {event, …}. */
import mqtt from "mqtt";
import * as runtime from "onnxruntime-web/wasm";
import { Agent } from "../device/agent.mjs";
import { Bench, breathe } from "../device/bench.mjs";
import { Home } from "../device/home.mjs";
import { indexedStore } from "../device/indexed_store.mjs";
import { live } from "../device/live.mjs";
import { memoryStore } from "../device/store.mjs";
import { namesOf, trustedOf } from "../device/trusted.mjs";
import { openArtifact } from "../engine/artifact.mjs";
import { floats } from "../engine/arrays.mjs";
import { split } from "../engine/dataset.mjs";
import { Engine } from "../engine/engine.mjs";
import { ConfigError, FleetuneError, StateError, TransportError, oneLine } from "../engine/errors.mjs";
import { evaluate } from "../engine/evaluation.mjs";
import { GOLDEN, selfcheck } from "../engine/golden.mjs";
import { readTensors, writeTensors } from "../engine/safetensors.mjs";
import { TextReader } from "../engine/text.mjs";
import { Trainer } from "../engine/trainer.mjs";
import { filledWork } from "../engine/work.mjs";
import { openAuthorities, openVoucher, Voucher } from "../wire/sums/vouching.mjs";
import { fastest, gpuRuntime } from "./gpu.mjs";

const HELD_SHARE = 0.2, SEQ_LEN = 128, CHECKPOINT_EVERY = 10;
const say = (event, more = {}) => postMessage({ event, ...more });
const state = { artifact: null, engine: null, texts: null, store: null, facts: null, stop: null, rules: [], adapter: null };

const [mjs, wasm] = ["loaded.mjs", "ort-wasm-simd-threaded.wasm"].map((name) => new URL(name, self.location.href).href);
const ort = { ...runtime, loaded: null };
ort.env.wasm.wasmPaths = { mjs, wasm };
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
ort.env.logLevel = "fatal";

/** A file of the artifact. */
async function read(name) {
  let answer;
  try {
    answer = await fetch(`artifact/${name}`);
  } catch (error) {
    throw new TransportError(`${name}: the server does not answer (${oneLine(error.message, 80)}); is fleetune web still running?`);
  }
  if (!answer.ok) throw Object.assign(new TransportError(`${name}: the server answers ${answer.status}`), { status: answer.status });
  return new Uint8Array(await answer.arrayBuffer());
}

const TASKS = {
  async open() {
    const artifact = await openArtifact(read, { where: "this page's artifact", also: [GOLDEN], onBytes: (done, all) => say("loading", { done, all }) });
    let kept = true;
    try {
      state.store = await indexedStore(`fleetune-${artifact.digest.slice(0, 16)}`);
      state.facts = await indexedStore("fleetune-signed"); // the job's, whatever its artifact
    } catch (error) {
      if (!(error instanceof StateError)) throw error;
      [state.store, state.facts, kept] = [memoryStore(), memoryStore(), error.message];
    }
    ort.loaded = await import(mjs).then(({ loaded }) => loaded, () => null); // without it no graph opens, and that is said
    Object.assign(state, { artifact, engine: new Engine(artifact, ort), texts: new TextReader(artifact) });
    state.adapter = await keptAdapter();
    const { manifest } = artifact, bytes = Object.values(manifest.files).reduce((sum, file) => sum + file.size_bytes, 0);
    return {
      name: manifest.name, labels: manifest.labels, layers: manifest.layers.length, baseDtype: manifest.base_dtype, digest: artifact.digest, bytes, kept,
      threads: ort.env.wasm.numThreads, isTrained: Boolean(await state.store.get("local/adapter")), data: await state.store.get("data"), joined: await state.store.get("joined"),
      name_: (await state.store.get("name")) ?? (await named()),
    };
  },

  async count({ data }) {
    const dataset = state.texts.labelled(data.content, data.name, SEQ_LEN);
    await state.store.set({ data });
    return { samples: dataset.numSamples, cut: dataset.numCut };
  },

  async train({ data, work }) {
    await chooseEngine();
    const given = filledWork({ ...work, seq_len: SEQ_LEN }), whole = state.texts.labelled(data.content, data.name, SEQ_LEN), { training, held } = split(whole, HELD_SHARE);
    const measure = (adapter) => held && evaluate(state.engine, held, adapter, { onBatch: breathe });
    const start = state.artifact.adapter(), trainer = new Trainer(state.engine, training, given, start), kept = await state.store.get("local/checkpoint");
    if (kept?.origin === trainer.origin) trainer.restore(kept);
    await state.store.set({ data });
    say("measured", { when: "before", ...(await measure(start)) });
    for (const step of trainer.history) say("step", step);
    await guarded(async (signal) => {
      while (!trainer.done && !signal.aborted) {
        if (state.rules.length) await rested(signal);
        else say("step", await trainer.step());
        if (trainer.stepIndex % CHECKPOINT_EVERY === 0) await state.store.set({ "local/checkpoint": trainer.save() });
        await breathe();
      }
    });
    state.adapter = trainer.adapter;
    await state.store.set({ "local/checkpoint": trainer.done ? undefined : trainer.save(), "local/adapter": writeTensors(trainer.adapter) });
    const after = await measure(trainer.adapter);
    say("measured", { when: "after", ...after });
    return { done: trainer.done, steps: trainer.stepIndex, effective: trainer.effectiveSamples, accuracy: after?.accuracy };
  },

  /** The keys, and the masks' authorities, that were pinned for a job, in PEM; empty for none. */
  async pinned({ job }) {
    return { trust: (await state.facts.get(`pinned/${job}`)) ?? "", authority: (await state.facts.get(`authority/${job}`)) ?? "" };
  },

  async join({ data, url, job, name, username, password, few, masked, trust, authority, certificate, key }) {
    if (!url) throw new ConfigError("this page was served without an MQTT server; start it as fleetune web ARTIFACT --mqtt URL");
    return alone(`fleetune-${job}-${name}`, () => guarded(async (signal) => {
      await chooseEngine();
      const trusted = trust ? await trustedOf(trust) : null;
      await trusted?.checkArtifact(state.artifact, await signature());
      if (trust) say("device", { kind: "trusts", text: namesOf(trust).join(" or ") });
      const authorities = authority ? openAuthorities(authority) : null, voucher = await voucherOf(name, certificate, key);
      await state.facts.set({ [`pinned/${job}`]: trust || undefined, [`authority/${job}`]: authority || undefined, ...(voucher && { [`voucher/${name}`]: { ...voucher } }) });
      await state.store.set({ data, name, joined: { job, name, few, masked } });
      const bench = new Bench(state.engine, data);
      const home = new Home({ deviceId: name, job, artifact: state.artifact, store: state.store, trusted, voucher, authorities, facts: state.facts, checkpointEvery: 5, terms: { secure_only: Boolean(masked), ...(few && { least_effective: 0 }) }, onEvent: (event) => say("device", event) });
      const agent = new Agent(home, bench, () => state.rules);
      state.home = home;
      const ended = await live({ mqtt, url, username: username || undefined, password: password || undefined, home, agent, signal });
      state.adapter = await keptAdapter();
      if (ended) await state.store.set({ joined: undefined });
      if (agent.isUnwanted) throw new ConfigError(`the aggregator of job ${job} cannot use this device: ${ended}`);
      return { ended };
    }));
  },

  async predict({ text }) {
    const dataset = state.texts.plain([text], SEQ_LEN), { data } = await state.engine.predict(dataset.rows([0]), state.adapter);
    const top = Math.max(...data), powers = [...data].map((x) => Math.exp(x - top)), sum = powers.reduce((a, b) => a + b, 0);
    return { answers: powers.map((p, i) => ({ label: state.artifact.manifest.labels[i], share: p / sum })).sort((a, b) => b.share - a.share).slice(0, 3) };
  },

  async left() {
    const keys = (await state.store.keys("")).filter((key) => key.endsWith("/left_log"));
    return { lines: (await Promise.all(keys.map((key) => state.store.get(key)))).flat() };
  },

  rules({ reasons }) {
    state.rules = reasons;
    return {};
  },

  stop() {
    state.stop?.abort();
    return {};
  },

  adapter: () => ({ content: writeTensors(state.adapter) }),

  async forget() {
    state.stop?.abort();
    for (const store of [state.store, state.facts]) await store.clear();
    state.adapter = state.artifact.adapter();
    return {};
  },

  /** For tests: the golden step, on WebGPU where `gpu` says so (a software adapter too), and what is chosen there. */
  async selfcheck({ gpu = false } = {}) {
    const runtime = gpu ? await gpuRuntime({ takesSoftware: true }) : ort;
    if (!runtime) return { ok: false, chosen: (await fastest(state.engine, { takesSoftware: true })).said };
    const { ok, worst, limit, tensors } = await selfcheck(state.artifact, runtime, gpu ? { provider: "webgpu" } : {});
    if (gpu) return { ok, worst, limit, count: Object.keys(tensors).length, chosen: (await fastest(state.engine, { takesSoftware: true })).said };
    return { ok, worst, limit, count: Object.keys(tensors).length, threads: ort.env.wasm.numThreads, isolated: self.crossOriginIsolated, subtle: Boolean(globalThis.crypto?.subtle) };
  },
};

/** The adapter that answers: the one trained here, or the newest of a job, or the artifact's own. */
async function keptAdapter() {
  const keys = (await state.store.keys("")).filter((key) => key === "local/adapter" || key.endsWith("/adapter")), content = keys.length && (await state.store.get(keys.at(-1)));
  if (!content) return state.artifact.adapter();
  const { arrays } = readTensors(content), own = state.artifact.adapter();
  return Object.fromEntries(Object.entries(own).map(([name, { shape, data }]) => [name, arrays[name]?.data.length === data.length ? floats(shape, arrays[name].data) : own[name]]));
}

/** What vouches for this device's keys under masks: the certificate and key that are given, or that were given under this name before; null without. */
async function voucherOf(name, certificate, key) {
  if (certificate || key) return openVoucher(certificate, key, { deviceId: name });
  const kept = await state.facts.get(`voucher/${name}`);
  return kept ? new Voucher(kept.certificate, kept.key) : null;
}

/** Take WebGPU where it is faster; looked at once. */
async function chooseEngine() {
  if (state.isChosen) return;
  state.isChosen = true;
  const { engine, said } = await fastest(state.engine);
  state.engine = engine;
  if (said) say("engine", { said });
}

/** The signature of the artifact; null where nobody signed it. */
async function signature() {
  return read("manifest.sig").catch((error) => {
    if (error.status === 404) return null;
    throw error;
  });
}

async function named() {
  const name = `page-${Math.floor(Math.random() * 2 ** 32).toString(36)}`;
  await state.store.set({ name });
  return name;
}

/** One run at a time, which `stop` ends between two steps. */
async function guarded(run) {
  if (state.stop) throw new ConfigError("something is running already; pause it first");
  state.stop = new AbortController();
  try {
    return await run(state.stop.signal);
  } finally {
    state.stop = null;
  }
}

/** Two tabs with one identity would throw each other off the server. */
function alone(name, run) {
  if (!navigator.locks) return run();
  return navigator.locks.request(name, { ifAvailable: true }, (lock) => {
    if (!lock) throw new ConfigError("another tab of this page is in this job under this name; close it, or give this device another name");
    return run();
  });
}

/** While the rules forbid work. */
async function rested(signal) {
  say("resting", { reasons: state.rules });
  while (state.rules.length && !signal.aborted) await new Promise((resolve) => setTimeout(resolve, 200));
}

self.onmessage = async ({ data: { id, do: name, ...given } }) => {
  try {
    postMessage({ id, found: await TASKS[name](given) });
  } catch (error) {
    if (!(error instanceof FleetuneError)) console.error(error);
    postMessage({ id, trouble: error instanceof FleetuneError ? error.message : `unexpected ${error.name}: ${oneLine(error.message)}; this is a fault of fleetune` });
  }
};
