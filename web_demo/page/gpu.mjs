/** WebGPU for the engine, where this browser has it and it is faster: its runtime is fetched only then. */
import { Engine } from "../engine/engine.mjs";
import { recordedStep, selfcheck } from "../engine/golden.mjs";

/* global WEBGPU_RUNTIME -- whether the page was built with the runtime; a constant that build.mjs puts in */
const at = (name) => new URL(name, self.location.href).href;

/**
 * onnxruntime-web with WebGPU; null where the page is built without it, or there is no adapter, or one in software alone.
 * @param {{takesSoftware?: boolean}} [options] for tests
 */
export async function gpuRuntime({ takesSoftware = false } = {}) {
  if (!WEBGPU_RUNTIME) return null;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter || (adapter.info?.isFallbackAdapter && !takesSoftware)) return null;
  const ort = await import(at("ort.webgpu.min.mjs")).catch(() => null); // the Android app goes without it, however the page was built
  if (!ort) return null;
  ort.env.wasm.wasmPaths = { mjs: at("ort-wasm-simd-threaded.asyncify.mjs"), wasm: at("ort-wasm-simd-threaded.asyncify.wasm") };
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "fatal";
  return ort;
}

/**
 * The faster of two engines: one on WebGPU, if its golden step is right and a step takes less time than on `engine`.
 * @param {Engine} engine on WebAssembly
 * @returns {Promise<{engine: Engine, said: string}>} `said`: what was measured, for people
 */
export async function fastest(engine, options) {
  const { artifact } = engine;
  let gpu;
  try {
    const ort = await gpuRuntime(options);
    if (!ort) return { engine, said: "" };
    if (!(await selfcheck(artifact, ort, { provider: "webgpu" })).ok) return { engine, said: "WebGPU is not taken: its golden step is wrong" };
    gpu = new Engine(artifact, ort, { provider: "webgpu" });
    const [there, here] = [await stepMs(gpu), await stepMs(engine)], times = `a step takes ${there.toFixed(0)} ms there, ${here.toFixed(0)} ms on WebAssembly`;
    if (there < here) return { engine: gpu, said: `WebGPU: ${times}` };
    await gpu.close();
    return { engine, said: `WebGPU is slower: ${times}` };
  } catch (error) {
    await gpu?.close().catch(() => {});
    return { engine, said: `WebGPU is not taken: ${error.message}` };
  }
}

/** Time of the recorded step, the second of two: the first opens graphs and compiles. */
async function stepMs(engine) {
  const { batch, adapter, plan } = recordedStep(engine.artifact);
  await engine.step(batch, plan, adapter);
  const begun = performance.now();
  await engine.step(batch, plan, adapter);
  return performance.now() - begun;
}
