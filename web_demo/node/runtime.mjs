/**
 * onnxruntime-web's wasm build as Node runs it: one thread, nothing logged. WebAssembly is compiled once, function by function, when it is
 * first called: otherwise V8 compiles all of it, and again what runs often, and that takes 150 MB.
 */
import { setFlagsFromString } from "node:v8";

setFlagsFromString("--wasm-lazy-compilation");
setFlagsFromString("--no-liftoff");
const ort = await import("onnxruntime-web");

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";
export { ort };
