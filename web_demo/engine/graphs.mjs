/** The one file that knows onnxruntime-web: opens graphs, runs them, and turns their errors into ours. */
import { array, TYPES } from "./arrays.mjs";
import { ArtifactError, ConfigError, DataError, oneLine, TransportError } from "./errors.mjs";

/** Numbers of a dtype as onnxruntime names it. */
const same = (name) => name;

export class Graphs {
  /**
   * @param {typeof import("onnxruntime-web")} ort the module, as the page or Node has loaded it
   * @param {{provider?: string}} [options] `wasm`, or `webgpu` where the build and the machine have it
   */
  constructor(ort, { provider = "wasm" } = {}) {
    this.ort = ort;
    this.options = {
      executionProviders: [provider], logSeverityLevel: 4, graphOptimizationLevel: "all", enableMemPattern: false,
      executionMode: "sequential",
    };
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
      return new OpenGraph(this.ort, session, name);
    } catch (error) {
      if (/no available backend|fetching of the wasm/.test(error.message))
        throw new TransportError(`onnxruntime's WebAssembly cannot be loaded here; load the page again, with its server running (${oneLine(error.message, 120)})`);
      throw new ArtifactError(`${name}: onnxruntime cannot open it: ${oneLine(error.message)}`);
    }
  }
}

export class OpenGraph {
  constructor(ort, session, name) {
    [this.ort, this.session, this.name] = [ort, session, name];
  }

  /**
   * Run the whole graph.
   * @param {import("./arrays.mjs").Arrays} feeds
   * @param {string[]} wanted names of outputs
   * @returns {Promise<import("./arrays.mjs").Arrays>}
   */
  async run(feeds, wanted) {
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

  /** Let go of the session. */
  close() {
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
