/**
 * MessagePack as msgspec writes it: integers in the fewest bytes, floats in eight. A library would write 600.0 as an integer, and
 * bytes could not be held to Python's. Reading is bounded by the bytes given.
 */
import { WireError } from "../engine/errors.mjs";

const DEPTH_MAX = 32;
/** Marks a number that is a float whatever its value. */
export class Float {
  constructor(value) {
    this.value = value;
  }
}

/** @param {unknown} value null, boolean, integer, Float, string, Uint8Array, array, Map or plain object @returns {Uint8Array} */
export function pack(value) {
  const writer = new Writer();
  writer.any(value);
  return writer.bytes();
}

class Writer {
  constructor() {
    this.content = new Uint8Array(256);
    this.view = new DataView(this.content.buffer);
    this.size = 0;
  }

  bytes() {
    return this.content.slice(0, this.size);
  }

  #room(count) {
    if (this.size + count > this.content.length) {
      const wider = new Uint8Array(Math.max(2 * this.content.length, this.size + count));
      wider.set(this.content);
      [this.content, this.view] = [wider, new DataView(wider.buffer)];
    }
    const place = this.size;
    this.size += count;
    return place;
  }

  #byte(byte) {
    const place = this.#room(1); // may move the content
    this.content[place] = byte;
  }

  #number(mark, width, value) {
    const place = this.#room(1 + width);
    this.content[place] = mark;
    if (width === 8) this.view.setBigUint64(place + 1, BigInt.asUintN(64, BigInt(value)));
    else if (width === 4) this.view.setUint32(place + 1, value);
    else if (width === 2) this.view.setUint16(place + 1, value);
    else this.content[place + 1] = value;
  }

  raw(bytes) {
    const place = this.#room(bytes.length);
    this.content.set(bytes, place);
  }

  any(value) {
    if (value === null || value === undefined) this.#byte(0xc0);
    else if (value === false || value === true) this.#byte(value ? 0xc3 : 0xc2);
    else if (value instanceof Float) this.#float(value.value);
    else if (typeof value === "number") this.integer(value);
    else if (typeof value === "string") this.text(value);
    else if (value instanceof Uint8Array) this.binary(value);
    else if (Array.isArray(value)) {
      this.head(value.length, 0x90, 16, 0xdc);
      value.forEach((item) => this.any(item));
    } else {
      const entries = value instanceof Map ? [...value] : Object.entries(value);
      this.head(entries.length, 0x80, 16, 0xde);
      for (const [name, item] of entries) {
        this.text(name);
        this.any(item);
      }
    }
  }

  #float(value) {
    const place = this.#room(9);
    this.content[place] = 0xcb;
    this.view.setFloat64(place + 1, value);
  }

  head(length, fixed, below, mark16) {
    if (length < below) this.#byte(fixed | length);
    else if (length < 2 ** 16) this.#number(mark16, 2, length);
    else this.#number(mark16 + 1, 4, length);
  }

  text(text) {
    const bytes = new TextEncoder().encode(text);
    if (bytes.length < 32) this.#byte(0xa0 | bytes.length);
    else this.#sized(bytes.length, 0xd9);
    this.raw(bytes);
  }

  binary(bytes) {
    this.#sized(bytes.length, 0xc4);
    this.raw(bytes);
  }

  #sized(length, mark) {
    if (length < 2 ** 8) this.#number(mark, 1, length);
    else if (length < 2 ** 16) this.#number(mark + 1, 2, length);
    else this.#number(mark + 2, 4, length);
  }

  integer(value) {
    if (!Number.isSafeInteger(value)) throw new WireError(`${value} is no integer that is sent`);
    if (value >= 0) {
      if (value < 128) this.#byte(value);
      else if (value < 2 ** 8) this.#number(0xcc, 1, value);
      else if (value < 2 ** 16) this.#number(0xcd, 2, value);
      else if (value < 2 ** 32) this.#number(0xce, 4, value);
      else this.#number(0xcf, 8, value);
    } else if (value >= -32) this.#byte(value + 256);
    else if (value >= -(2 ** 7)) this.#number(0xd0, 1, value);
    else if (value >= -(2 ** 15)) this.#number(0xd1, 2, value);
    else if (value >= -(2 ** 31)) this.#number(0xd2, 4, value);
    else this.#number(0xd3, 8, value);
  }
}

/** One value, and nothing behind it; maps as Map, byte strings as views. @param {Uint8Array} content */
export function unpack(content) {
  const reader = new Reader(content), value = reader.any(0);
  if (reader.place !== content.length) throw new WireError(`malformed: ${content.length - reader.place} bytes behind the end`);
  return value;
}

class Reader {
  constructor(content) {
    this.content = content;
    this.view = new DataView(content.buffer, content.byteOffset, content.length);
    this.place = 0;
  }

  #take(count) {
    const place = this.place;
    if (count > this.content.length - place) throw new WireError("malformed: it ends too early");
    this.place += count;
    return place;
  }

  #uint(width) {
    const place = this.#take(width);
    if (width === 1) return this.content[place];
    if (width === 2) return this.view.getUint16(place);
    if (width === 4) return this.view.getUint32(place);
    return whole(this.view.getBigUint64(place));
  }

  any(depth) {
    if (depth > DEPTH_MAX) throw new WireError("malformed: too deep");
    const mark = this.#uint(1);
    if (mark < 0x80) return mark;
    if (mark < 0x90) return this.#map(mark & 15, depth);
    if (mark < 0xa0) return this.#list(mark & 15, depth);
    if (mark < 0xc0) return this.#text(mark & 31);
    if (mark >= 0xe0) return mark - 256;
    switch (mark) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return this.#binary(this.#uint(1 << (mark - 0xc4)));
      case 0xca: return this.view.getFloat32(this.#take(4));
      case 0xcb: return this.view.getFloat64(this.#take(8));
      case 0xcc: case 0xcd: case 0xce: case 0xcf: return this.#uint(1 << (mark - 0xcc));
      case 0xd0: return this.view.getInt8(this.#take(1));
      case 0xd1: return this.view.getInt16(this.#take(2));
      case 0xd2: return this.view.getInt32(this.#take(4));
      case 0xd3: return whole(this.view.getBigInt64(this.#take(8)));
      case 0xd9: case 0xda: case 0xdb: return this.#text(this.#uint(1 << (mark - 0xd9)));
      case 0xdc: case 0xdd: return this.#list(this.#uint(mark === 0xdc ? 2 : 4), depth);
      case 0xde: case 0xdf: return this.#map(this.#uint(mark === 0xde ? 2 : 4), depth);
      default: throw new WireError(`malformed: no value begins with ${mark}`);
    }
  }

  #binary(length) {
    const place = this.#take(length);
    return this.content.subarray(place, place + length);
  }

  #text(length) {
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(this.#binary(length));
    } catch (error) {
      if (error instanceof WireError) throw error;
      throw new WireError("malformed: text that is no UTF-8");
    }
  }

  #list(length, depth) {
    if (length > this.content.length - this.place) throw new WireError("malformed: it ends too early");
    return Array.from({ length }, () => this.any(depth + 1));
  }

  #map(length, depth) {
    if (2 * length > this.content.length - this.place) throw new WireError("malformed: it ends too early");
    const found = new Map();
    for (let i = 0; i < length; i++) {
      const key = this.any(depth + 1);
      if (typeof key !== "string") throw new WireError("malformed: a key that is no text");
      found.set(key, this.any(depth + 1));
    }
    return found;
  }
}

function whole(value) {
  const number = Number(value);
  if (!Number.isSafeInteger(number)) throw new WireError(`${value} is no integer that is taken`);
  return number;
}
