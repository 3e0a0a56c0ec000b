/**
 * `npm run build [-- [--webgpu] [FOLDER]]`: the page in one folder that `fleetune web` serves, ../toolkit/page or the folder given; nothing is
 * fetched. `--webgpu` puts onnxruntime's WebGPU runtime beside it, 27 MB, of which a browser without a GPU fetches nothing.
 */
import { cp, mkdir, rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const given = process.argv.slice(2), hasGpu = given.includes("--webgpu"), here = dirname(fileURLToPath(import.meta.url));
const out = given.find((word) => !word.startsWith("--")) ?? join(here, "..", "toolkit", "page");
const ort = join(here, "node_modules", "onnxruntime-web", "dist");
await rm(out, { recursive: true, force: true });
await mkdir(out, { recursive: true });
await build({
  entryPoints: [join(here, "page", "app.mjs"), join(here, "page", "worker.mjs")], outdir: out, outExtension: { ".js": ".js" }, bundle: true, minify: true,
  format: "esm", target: "es2022", platform: "browser", conditions: ["onnxruntime-web-use-extern-wasm"], define: { global: "globalThis", WEBGPU_RUNTIME: String(hasGpu) }, legalComments: "linked",
  logLevel: "warning",
});
for (const name of ["index.html", "style.css", "icon.svg", "loaded.mjs"]) await cp(join(here, "page", name), join(out, name));
const wasm = ["ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs"];
/** Fetched only by a browser that has a GPU for it. */
const gpu = ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm", "ort-wasm-simd-threaded.asyncify.mjs"];
for (const name of [...wasm, ...(hasGpu ? gpu : [])]) await cp(join(ort, name), join(out, name));
