/** Block graphs, chained: prelude, the layers of a route, head, and back; as Python's `engine/chain`. */
import { array, takeRows, withRows, zeros } from "./arrays.mjs";
import { ArtifactError } from "./errors.mjs";
import { Lease } from "./heap.mjs";
import { withInitializers } from "./initializers.mjs";
import { isLoraB, labelIndex } from "./manifest.mjs";
import { pullsOf } from "./pulls.mjs";
import { argmax, runTokens } from "./token_head.mjs";

/** @typedef {Map<string, import("./arrays.mjs").NDArray>} Scope values by role and index, as `at` joins them */
const at = (role, index) => `${role}/${index}`;
/** What is looked at outside of a pass; all else may stay where the next run takes it. */
const COPIED = new Set(["loss", "logits", "d_weight"]);

export class Chain {
  /**
   * @param {import("./artifact.mjs").Artifact} artifact
   * @param {import("./graphs.mjs").Graphs} graphs
   * @param {{bakes?: boolean}} [options] `bakes`: the prelude's frozen tables become initializers, copied into the heap once; by default
   *   where weights do not lie in it anyway
   */
  constructor(artifact, graphs, { bakes = !graphs.staysInHeap } = {}) {
    [this.artifact, this.manifest, this.graphs, this.bakes] = [artifact, artifact.manifest, graphs, bakes];
    this.opened = new Map();
    this.labels = at("batch", labelIndex(this.manifest));
  }

  /** Let go of the graphs. */
  async close() {
    const open = [...this.opened.values()];
    this.opened.clear();
    for (const graph of open) await (await graph.catch(() => null))?.graph.close();
  }

  /**
   * Forward and backward on rows that run together.
   * @param {import("./arrays.mjs").Arrays} batch
   * @param {import("./plans.mjs").Route} way
   * @param {import("./arrays.mjs").Arrays} adapter
   * @param {{keepLogits?: boolean, gates?: (number[]|null)[]|null}} [options] `gates`: for each layer the rows that run through it, null for all
   */
  async step(batch, way, adapter, { keepLogits = false, gates = null } = {}) {
    return this.#passing({ scope: this.#values(batch), way, adapter, gates }, async (pass) => {
      const tape = await this.#rise(pass, way.layers);
      const { d_hidden: gradient, ...end } = await this.#head(pass, { backward: tape.length > 0, keepLogits });
      const pulls = pullsOf(end.logits, batch[this.manifest.inputs[labelIndex(this.manifest)].name], gradient);
      if (gradient) await this.#descend(pass, tape, gradient, end.grads);
      return { ...end, pulls };
    });
  }

  /** Loss and likeliest classes at full depth. */
  async evaluate(batch, way, adapter) {
    return this.#passing({ scope: this.#values(batch), way, adapter, gates: null }, async (pass) => {
      await this.#rise(pass, way.layers);
      return this.#head(pass, { backward: false, keepLogits: false });
    });
  }

  /** Logits of a batch that needs no labels; `choose` picks of the hidden stream (B, S, H). */
  async predict(batch, way, adapter, choose = (hidden) => hidden) {
    const { head } = this.manifest, graph = head.graphs.predict;
    return this.#passing({ scope: this.#values(batch), way, adapter, gates: null }, async (pass) => {
      await this.#rise(pass, way.layers);
      pass.scope.set(at("hidden", 0), choose(pass.scope.get(at("hidden", 0))));
      if (graph.inputs.some((port) => at(port.role, port.index) === this.labels)) pass.scope.set(this.labels, this.#blankLabels(batch));
      return (await this.#run(graph, pass.scope, head.tensors, adapter)).get(at("logits", 0));
    });
  }

  /** Run the prelude and what follows; whatever is lent meanwhile is let go of at the end, however it comes. */
  async #passing(given, follow) {
    const pass = { ...given, leases: [] };
    try {
      await this.#enter(pass);
      return await follow(pass);
    } finally {
      for (const lease of pass.leases) lease.free();
    }
  }

  #blankLabels(batch) {
    const sizes = {}, rows = this.manifest.inputs;
    for (const row of rows) if (batch[row.name]) row.shape.forEach((extent, i) => (sizes[extent] ??= batch[row.name].shape[i]));
    const { dtype, shape } = rows[labelIndex(this.manifest)];
    return zeros(dtype, shape.map((extent) => (typeof extent === "string" ? sizes[extent] : extent)));
  }

  async #enter(pass) {
    const { prelude } = this.manifest;
    const found = await this.#run(prelude.graphs.forward, pass.scope, prelude.tensors, pass.adapter, { bakes: this.bakes, lease: leaseOf(pass) });
    for (const [place, value] of found) pass.scope.set(place, value);
  }

  async #rise(pass, layers) {
    const { scope, way, adapter, gates } = pass, tape = [];
    let below = null; // what lends the hidden stream of layers that are not on the tape
    for (const index of layers) {
      const layer = this.manifest.layers[index], { graphs } = this.manifest.kinds[layer.kind], rows = gates?.[index] ?? null;
      const whole = scope.get(at("hidden", 0)), given = new Map([[at("hidden", 0), picked(whole, rows)]]);
      layer.sides.forEach((side, slot) => given.set(at("side", slot), this.#side(scope, graphs, side, slot, rows)));
      const graph = graphs[way.saved.has(index) ? "forward_save" : "forward"];
      const lease = leaseOf(pass), found = await this.#run(graph, given, layer.tensors, adapter, { bare: way.bare.has(index), lease });
      scope.set(at("hidden", 0), merged(whole, found.get(at("hidden", 0)), rows));
      found.delete(at("hidden", 0));
      const isTaped = index >= way.lowest && !way.around.has(index);
      if (isTaped) tape.push({ index, kept: new Map([...given, ...found]), rows, leases: [lease, below] });
      else below?.free();
      below = isTaped ? null : lease;
    }
    return tape;
  }

  async #descend(pass, tape, gradient, grads) {
    const { way, adapter } = pass;
    let above = null;
    while (tape.length) {
      const { index, kept, rows, leases } = tape.pop(), lease = leaseOf(pass);
      const layer = this.manifest.layers[index], { graphs } = this.manifest.kinds[layer.kind];
      const purpose = (tape.length ? "backward" : "backward_lowest") + (way.saved.has(index) ? "" : "_recompute");
      kept.set(at("d_hidden", 0), picked(gradient, rows));
      const found = await this.#run(graphs[purpose], kept, layer.tensors, adapter, { bare: way.bare.has(index), lease });
      if (tape.length) gradient = merged(gradient, found.get(at("d_hidden", 0)), rows);
      if (way.trained.has(index)) addTo(grads, this.#gradients(found, layer.tensors));
      for (const done of [...leases, above]) done?.free();
      above = lease;
    }
  }

  #side(scope, graphs, side, slot, rows) {
    const value = scope.get(at("side", side));
    const port = graphs.forward.inputs.find((p) => p.role === "side" && p.index === slot);
    return rows && port?.shape[0] === "batch" ? picked(value, rows) : value;
  }

  async #head(pass, { backward, keepLogits }) {
    const { scope, adapter } = pass, { head } = this.manifest, graph = head.graphs.train;
    const numClasses = graph.outputs.find((port) => port.role === "logits").shape.at(-1);
    if (head.targets) {
      const run = async (hidden, targets) => {
        const given = new Map([[at("hidden", 0), hidden], [this.labels, targets]]);
        const ends = await this.#run(graph, given, head.tensors, adapter);
        return {
          loss: Number(ends.get(at("loss", 0)).data[0]), logits: ends.get(at("logits", 0)), d_hidden: ends.get(at("d_hidden", 0)),
          grads: this.#gradients(ends, head.tensors),
        };
      };
      const options = { targets: head.targets, numClasses, keepLogits, backward };
      return runTokens(run, scope.get(at("hidden", 0)), scope.get(this.labels), options);
    }
    const ends = await this.#run(graph, scope, head.tensors, adapter, { lease: leaseOf(pass) }), logits = ends.get(at("logits", 0));
    const answers = Int32Array.from({ length: logits.data.length / numClasses }, (_, i) => argmax(logits.data, i * numClasses, numClasses));
    return {
      loss: Number(ends.get(at("loss", 0)).data[0]), logits, answers, d_hidden: backward ? ends.get(at("d_hidden", 0)) : null,
      grads: this.#gradients(ends, head.tensors),
    };
  }

  #gradients(results, slots) {
    const found = {};
    for (const [place, value] of results) {
      const [role, slot] = place.split("/");
      if (role === "d_weight") addTo(found, { [this.manifest.tensors[slots[slot]].name]: value });
    }
    return found;
  }

  #values(batch) {
    const scope = new Map();
    this.manifest.inputs.forEach((row, i) => batch[row.name] && scope.set(at("batch", i), batch[row.name]));
    return scope;
  }

  async #run(graph, scope, slots, adapter, { bare = false, bakes = false, lease = null } = {}) {
    const { graph: open, baked } = await this.#graph(graph, slots, bakes), feeds = {};
    if (this.graphs.heap) this.artifact.moveBase((bytes) => this.graphs.heap.adopt(bytes));
    for (const port of graph.inputs) {
      if (baked.has(port.name)) continue;
      feeds[port.name] = port.role === "weight" ? this.#weight(slots[port.index], adapter, bare) : scope.get(at(port.role, port.index));
      if (!feeds[port.name]) throw new ArtifactError(`${graph.file}: nothing gives its ${port.role} ${port.index}`);
    }
    const lent = lease && { lease, stays: new Set(graph.outputs.filter((port) => !COPIED.has(port.role)).map((port) => port.name)) };
    const found = await open.run(feeds, graph.outputs.map((port) => port.name), lent);
    return new Map(graph.outputs.map((port) => [at(port.role, port.index), found[port.name]]));
  }

  #weight(index, adapter, bare) {
    const row = this.manifest.tensors[index];
    if (row.trainable) {
      const value = adapter[row.name];
      if (!value || value.data.length !== row.shape.reduce((a, b) => a * b, 1)) throw new ArtifactError(`adapter tensor ${row.name}: expected [${row.shape}]`);
      return bare && isLoraB(row.name) ? zeros(row.dtype, row.shape) : array(row.dtype, row.shape, value.data);
    }
    return this.artifact.base(row);
  }

  #graph(graph, slots, bakes) {
    if (!this.opened.has(graph.file)) this.opened.set(graph.file, this.#open(graph, slots, bakes));
    return this.opened.get(graph.file);
  }

  async #open(graph, slots, bakes) {
    const fixed = bakes ? graph.inputs.filter((p) => p.role === "weight" && !this.manifest.tensors[slots[p.index]].trainable) : [];
    const weights = Object.fromEntries(fixed.map((port) => [port.name, this.artifact.base(this.manifest.tensors[slots[port.index]])]));
    const model = this.artifact.file(graph.file), given = fixed.length ? withInitializers(model, weights) : { model, externalData: [] };
    const opened = await this.graphs.open(given.model, graph.file, given.externalData);
    return { graph: opened, baked: new Set(Object.keys(weights)) };
  }
}

function leaseOf(pass) {
  const lease = new Lease();
  pass.leases.push(lease);
  return lease;
}

const picked = (value, rows) => (rows ? takeRows(value, rows) : value);
const merged = (whole, some, rows) => (rows ? withRows(whole, rows, some) : some);

/** Add gradients to those of the same names, in float32. */
function addTo(grads, gained) {
  for (const [name, value] of Object.entries(gained)) {
    if (!grads[name]) grads[name] = value;
    else {
      const sum = Float32Array.from(grads[name].data, (g, i) => g + value.data[i]);
      grads[name] = array("float32", value.shape, sum);
    }
  }
}
