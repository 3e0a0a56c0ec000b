/**
 * Arrays in the memory of onnxruntime's WebAssembly: what stays there is an input of the next run as it lies. Its JavaScript copies every
 * input in and every output out; of a step these are 150 and 63 MB.
 *
 * The module's own functions are called, those that onnxruntime-web 1.30 calls. Its memory is shared, so that a view of it stays good when it grows.
 */
import { array, sizeOf, TYPES } from "./arrays.mjs";
import { ONNX_TYPES } from "./initializers.mjs";

const POINTER = 4, ON_CPU = 1, NAMES = Object.fromEntries(Object.entries(ONNX_TYPES).map(([name, number]) => [number, name]));
const CALLED = ["_OrtRun", "_OrtCreateTensor", "_OrtReleaseTensor", "_OrtGetTensorData", "_OrtGetLastError", "_OrtFree", "_malloc", "_free", "stackSave", "getValue", "HEAPU8"];

/** Arrays that are let go of together. */
export class Lease {
  #heap = null;
  #values = [];

  add(heap, value) {
    this.#heap = heap;
    this.#values.push(value);
  }

  /** Let go; views of them are not to be looked at any more. */
  free() {
    for (const value of this.#values.splice(0)) this.#heap.module._OrtReleaseTensor(value);
  }
}

/** The heap of a module that is loaded; null for none, or one of another release. */
export const heapOf = (module) => (module && CALLED.every((name) => name in module) ? new Heap(module) : null);

class Heap {
  constructor(module) {
    this.module = module;
  }

  /** Whether an array lies in this memory. */
  holds = ({ buffer }) => buffer.constructor === this.module.HEAPU8.buffer.constructor;

  /** The same bytes in this memory, for good; as they are where there is no room. @param {Uint8Array} bytes @returns {Uint8Array} */
  adopt(bytes) {
    if (this.holds(bytes)) return bytes;
    const place = this.module._malloc(bytes.length);
    if (!place) return bytes;
    this.module.HEAPU8.set(bytes, place);
    return new Uint8Array(this.module.HEAPU8.buffer, place, bytes.length);
  }

  /** An open session, by its handle. @param {string[]} names of its inputs and outputs */
  session(handle, names) {
    const places = new Map(names.map((name) => [name, this.#text(name)]));
    return {
      run: (feeds, wanted, lent) => this.#run(handle, places, feeds, wanted, lent),
      close: () => places.forEach((place) => this.module._free(place)),
    };
  }

  #text(text) {
    const bytes = new TextEncoder().encode(`${text}\0`), place = this.module._malloc(bytes.length);
    this.module.HEAPU8.set(bytes, place);
    return place;
  }

  #run(handle, places, feeds, wanted, lent) {
    const { module } = this, stack = module.stackSave(), inputs = Object.entries(feeds), copied = [], values = [];
    try {
      for (const [, value] of inputs) values.push(this.#value(value, copied));
      const given = this.#pointers(values), found = this.#pointers(wanted.map(() => 0));
      const from = this.#pointers(inputs.map(([name]) => places.get(name))), to = this.#pointers(wanted.map((name) => places.get(name)));
      const code = module._OrtRun(handle, from, given, inputs.length, to, wanted.length, found, 0);
      if (code) throw this.#error();
      return Object.fromEntries(wanted.map((name, i) => [name, this.#array(module.getValue(found + POINTER * i, "*"), lent?.stays.has(name) ? lent.lease : null)]));
    } finally {
      for (const value of values) module._OrtReleaseTensor(value);
      for (const place of copied) module._free(place);
      module.stackRestore(stack);
    }
  }

  #pointers(values) {
    const place = this.module.stackAlloc(POINTER * Math.max(1, values.length));
    values.forEach((value, i) => this.module.setValue(place + POINTER * i, value, "*"));
    return place;
  }

  /** A tensor over an array: as it lies, or over a copy in this memory. */
  #value({ dtype, shape, data }, copied) {
    let place = data.byteOffset;
    if (!this.holds(data)) {
      place = this.module._malloc(Math.max(1, data.byteLength));
      if (!place) throw new Error(`cannot allocate memory for ${data.byteLength} bytes`);
      copied.push(place);
      this.module.HEAPU8.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), place);
    }
    const value = this.module._OrtCreateTensor(ONNX_TYPES[dtype], place, data.byteLength, this.#pointers(shape), shape.length, ON_CPU);
    if (!value) throw this.#error();
    return value;
  }

  /** What a tensor holds: a view that a lease keeps, or a copy, and the tensor is let go of. */
  #array(value, lease) {
    const { module } = this, place = module.stackAlloc(4 * POINTER);
    if (module._OrtGetTensorData(value, place, place + POINTER, place + 2 * POINTER, place + 3 * POINTER)) throw this.#error();
    const [type, start, extents, rank] = [0, 1, 2, 3].map((i) => module.getValue(place + POINTER * i, i % 3 ? "*" : "i32"));
    const shape = Array.from({ length: rank }, (_, i) => module.getValue(extents + POINTER * i, "i32")), dtype = NAMES[type];
    module._OrtFree(extents);
    const view = new TYPES[dtype](module.HEAPU8.buffer, start, sizeOf(shape));
    if (lease) {
      lease.add(this, value);
      return array(dtype, shape, view);
    }
    const data = view.slice();
    module._OrtReleaseTensor(value);
    return array(dtype, shape, data);
  }

  #error() {
    const place = this.module.stackAlloc(2 * POINTER);
    this.module._OrtGetLastError(place, place + POINTER);
    const said = this.module.getValue(place + POINTER, "*");
    return new Error(said ? this.module.UTF8ToString(said) : "no reason is given");
  }
}
