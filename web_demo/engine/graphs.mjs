/** The one file that knows onnxruntime-web: opens graphs, runs them, and turns their errors into ours. */
import { array, TYPES } from "./arrays.mjs";
import { heapOf } from "./heap.mjs";
import { ArtifactError, ConfigError, DataError, oneLine, TransportError } from "./errors.mjs";

/** Numbers of a dtype as onnxruntime names it. */
const same = (name) => name;

export class Graphs {
  /**
   * @param {typeof import("onnxruntime-web") & {loaded?: {module?: object}}} ort as the page or Node has loaded it; `loaded`: where its
   *   WebAssembly module is found once a graph was opened, so that arrays stay in its memory
   * @param {{provider?: string}} [options] `wasm`, or `webgpu` where the build and the machine have it
   */
  constructor(ort, { provider = "wasm" } = {}) {
    this.ort = ort;
    this.options = {
      executionProviders: [provider], logSeverityLevel: 4, graphOptimizationLevel: "all", enableMemPattern: false, enableCpuMemArena: false,
      executionMode: "sequential",
    };
    /** @type {import("./heap.mjs").Heap|null} where weights and what runs leave for one another lie; known once a graph was opened */
    this.heap = null;
  }

  /** Whether arrays stay in the memory of WebAssembly, so that an input of a run costs nothing. */
  get staysInHeap() {
    return Boolean(this.ort.loaded);
  }

  /**
   * @param {Uint8Array} model
   * @param {string} name for messages
   * @param {{path: string, data: Uint8Array}[]} [externalData]
   * @returns {Promise<OpenGraph>}
   */
  async open(model, name, externalData = []) {
    try {
      const session = await this.ort.InferenceSession.create(model, externalData.length ? { ...this.options, externalData } : this.options);
      this.heap ??= heapOf(this.ort.loaded?.module);
      return new OpenGraph(this.ort, session, name, this.heap);
    } catch (error) {
      if (/no available backend|fetching of the wasm/.test(error.message))
        throw new TransportError(`onnxruntime's WebAssembly cannot be loaded here; load the page again, with its server running (${oneLine(error.message, 120)})`);
      throw new ArtifactError(`${name}: onnxruntime cannot open it: ${oneLine(error.message)}`);
    }
  }
}

export class OpenGraph {
  constructor(ort, session, name, heap) {
    [this.ort, this.session, this.name] = [ort, session, name];
    const handle = session.handler?.sessionId; // of a session on the heap: its address
    this.inHeap = heap && handle ? heap.session(handle, [...session.inputNames, ...session.outputNames]) : null;
  }

  /**
   * Run the whole graph.
   * @param {import("./arrays.mjs").Arrays} feeds
   * @param {string[]} wanted names of outputs
   * @param {{stays: Set<string>, lease: import("./heap.mjs").Lease}} [lent] outputs that may stay in onnxruntime's memory until `lease` is let go of
   * @returns {Promise<import("./arrays.mjs").Arrays>}
   */
  async run(feeds, wanted, lent) {
    if (this.inHeap) return this.#runInHeap(feeds, wanted, lent);
    const given = {};
    for (const [name, { dtype, shape, data }] of Object.entries(feeds)) given[name] = new this.ort.Tensor(same(dtype), data, shape);
    let found;
    try {
      found = await this.session.run(given, wanted);
    } catch (error) {
      throw errorOf(this.name, error);
    }
    return Object.fromEntries(wanted.map((name) => [name, taken(found[name])]));
  }

  #runInHeap(feeds, wanted, lent) {
    try {
      return this.inHeap.run(feeds, wanted, lent);
    } catch (error) {
      throw errorOf(this.name, error);
    }
  }

  /** Let go of the session. */
  close() {
    this.inHeap?.close();
    return this.session.release();
  }
}

function taken(tensor) {
  const { type, dims, data } = tensor, Type = TYPES[type];
  // Where the engine has Float16Array, halves come as numbers; here they are bits.
  const bits = data instanceof Type ? data : new Type(data.buffer, data.byteOffset, data.length);
  return array(type, [...dims], bits);
}

function errorOf(graph, error) {
  const said = `${graph}: onnxruntime: ${oneLine(String(error?.message ?? error).split(/\s+/).join(" "))}`;
  if (said.includes("out of data bounds")) return new DataError(`the data holds an id for which the model has no row; ${said}`);
  if (/allocate memory|bad_alloc|out of memory|Aborted|memory access out of bounds/i.test(said))
    return new ConfigError(`not enough memory: take smaller batches or shorter texts; ${said}`);
  return new ArtifactError(`the graph does not run; ${said}`);
}
