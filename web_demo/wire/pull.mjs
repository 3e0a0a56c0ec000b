/** A transfer being pulled: when to ask for what; as Python's `contracts/pull`. Times are seconds, given by whoever calls. */
import { Incoming } from "./transfer.mjs";

export const STALL_S = 10;
const PATIENCE = 3, SLOWEST_BYTES_S = 10e3, FLYING_S = 10, WAIT_MAX_S = 600;

export class Pull {
  /** WireError as `Incoming`. */
  constructor(manifest, { sizeBytesMax, now, window = 16, stallS = STALL_S }) {
    this.incoming = new Incoming(manifest, sizeBytesMax);
    [this.windowMax, this.window, this.stallS] = [window, Math.min(4, window), stallS];
    /** Chunks on their way, and when they were asked for last. @type {Map<number, number>} */
    this.flying = new Map();
    this.again = new Set();
    [this.numStalls, this.isAnswered, this.sPerByte, this.progressAt, this.askedAt] = [0, false, 0, now, now];
  }

  get done() {
    return this.incoming.done;
  }

  get sha256() {
    return this.incoming.manifest.sha256;
  }

  /** Time at which what is on its way counts as lost, if nothing comes before. */
  get waitsUntil() {
    const { chunk_bytes, size_bytes } = this.incoming.manifest, flying = Math.min(this.flying.size * chunk_bytes, size_bytes);
    const wait = Math.max(this.stallS, PATIENCE * flying * (this.sPerByte || 1 / SLOWEST_BYTES_S));
    return Math.max(this.progressAt, this.askedAt) + Math.min(wait * 2 ** Math.min(this.numStalls, 10), WAIT_MAX_S);
  }

  /** Time from which `due` has a request, if no chunk comes before. */
  get dueAt() {
    return this.#next().length ? -Infinity : this.flying.size ? this.waitsUntil : Infinity;
  }

  /** Go on with the same content in chunks of another size. */
  cutAnew(manifest, { sizeBytesMax, now }) {
    const pull = new Pull(manifest, { sizeBytesMax, now, window: this.windowMax, stallS: this.stallS });
    pull.incoming.takeOver(this.incoming);
    pull.sPerByte = this.sPerByte;
    return pull;
  }

  /** Store a chunk; false if it was here already. */
  add(chunk, now) {
    if (!this.incoming.add(chunk)) return false;
    const asked = this.flying.get(chunk.index);
    if (asked !== undefined) {
      this.flying.delete(chunk.index);
      this.isAnswered = this.again.has(chunk.index);
      this.#learn(now - Math.max(asked, this.progressAt), chunk.data.length);
    }
    this.window = Math.min(this.windowMax, this.window + 1);
    this.progressAt = now;
    return true;
  }

  /** The request to send now, or null; call it after every chunk and now and then. */
  due(now) {
    const lost = this.#lost(now), wanted = lost.length ? lost : this.#next();
    if (!wanted.length) return null;
    for (const i of wanted) this.flying.set(i, now);
    this.askedAt = now;
    return this.incoming.request(wanted);
  }

  /** After a reconnection: what is on its way is lost. */
  restart(now) {
    if (this.flying.size) this.window = Math.max(1, Math.floor(this.window / 2));
    this.flying.clear();
    this.progressAt = now;
  }

  content() {
    return this.incoming.content();
  }

  #learn(took, bytes) {
    const pace = took / bytes, known = this.sPerByte;
    if (!this.isAnswered) this.numStalls = 0;
    else if (pace <= known) return;
    this.sPerByte = known + (!known ? 1 : pace > known ? 0.5 : 0.125) * (pace - known);
  }

  #lost(now) {
    if (!this.flying.size || now < this.waitsUntil) return [];
    this.numStalls += 1;
    if (!this.isAnswered) this.window = Math.max(1, Math.floor(this.window / 2));
    const lost = [...this.flying.keys()].sort((a, b) => a - b).slice(0, this.isAnswered ? this.window : 1);
    lost.forEach((i) => this.again.add(i));
    this.isAnswered = false;
    return lost;
  }

  #next() {
    const window = this.#room();
    if (this.flying.size > Math.floor(window / 2)) return [];
    return this.incoming.missing().filter((i) => !this.flying.has(i)).slice(0, window - this.flying.size);
  }

  #room() {
    const chunkS = this.sPerByte * this.incoming.manifest.chunk_bytes, most = chunkS ? Math.max(2, Math.floor(FLYING_S / chunkS)) : this.window;
    return Math.max(1, Math.min(this.window, most, this.windowMax));
  }
}
