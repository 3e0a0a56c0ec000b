/** onnxruntime-web's wasm build as Node runs it: one thread, nothing logged. */
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";
export { ort };
