/** onnxruntime's WebAssembly module where the engine finds it, for `env.wasm.wasmPaths`; a file of the page as it is, not bundled. */
import factory from "./ort-wasm-simd-threaded.mjs";

export const loaded = { module: null };
export default async (given) => (loaded.module = await factory(given));
