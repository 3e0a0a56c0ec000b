/** onnxruntime's WebAssembly module where the engine finds it, for `env.wasm.wasmPaths`. */
import factory from "onnxruntime-web/ort-wasm-simd-threaded.mjs";

export const loaded = { module: null };
export default async (given) => (loaded.module = await factory(given));
