/**
 * onnxruntime-web's wasm build as Node runs it: one thread, nothing logged. WebAssembly is compiled once, function by function, when it is
 * first called: otherwise V8 compiles all of it, and again what runs often, and that takes 150 MB.
 */
import { setFlagsFromString } from "node:v8";

setFlagsFromString("--wasm-lazy-compilation");
setFlagsFromString("--no-liftoff");
const plain = await import("onnxruntime-web"), { loaded } = await import("./loaded.mjs");

plain.env.wasm.wasmPaths = { mjs: new URL("loaded.mjs", import.meta.url).href, wasm: import.meta.resolve("onnxruntime-web/ort-wasm-simd-threaded.wasm") };
plain.env.wasm.numThreads = 1;
plain.env.logLevel = "fatal";
/** As it runs where arrays stay in its memory; `plain`: where they are copied in and out, as WebGPU's runtime has it. */
export const ort = { ...plain, loaded };
export { plain };
