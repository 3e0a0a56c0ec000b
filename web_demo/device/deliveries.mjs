/** What a device owes the aggregator: announced until there is a verdict, served in chunks, kept in the store. */
import { WireError } from "../engine/errors.mjs";
import { sha256Hex } from "../engine/sha256.mjs";
import { decode, encode, taskIdOf } from "../wire/messages.mjs";
import { Outgoing } from "../wire/transfer.mjs";

const REPEAT_S = 5, REPEAT_MAX_S = 60, SERVED_S = 15;

export class Deliveries {
  /** @param {import("./home.mjs").Home} home */
  constructor(home) {
    this.home = home;
    /** @type {{key: string, header: object, payload: Uint8Array, due: number, pause: number, outgoing: Outgoing|null}[]} */
    this.parcels = [];
  }

  /** Take up what the store holds; a damaged entry is dropped, so that its work is done again. */
  async open() {
    for (const key of await this.home.store.keys(this.home.key("outbox/"))) {
      const parcel = parcelOf(key, await this.home.store.get(key));
      if (parcel) this.parcels.push(parcel);
      else await this.home.store.set({ [key]: undefined });
    }
  }

  /** The last round of which something waits for its verdict; -1 for none. */
  get newestRound() {
    return Math.max(-1, ...this.parcels.map(({ header }) => header.round));
  }

  holds = (taskId) => this.parcels.find((parcel) => taskIdOf(parcel.header) === taskId);

  get dueAt() {
    return Math.min(Infinity, ...this.parcels.map((parcel) => parcel.due));
  }

  /**
   * Keep, with other changes of the store in one, and announce next.
   * @param {object} header an update without its payload's manifest, or a report
   * @param {Uint8Array|null} payload of an update
   */
  async put(header, payload, changes) {
    const outgoing = payload && new Outgoing(payload, this.home.link.chunkBytes);
    const whole = outgoing ? { ...header, payload: outgoing.manifest } : header;
    const key = this.home.key(`outbox/${taskIdOf(whole)}/${outgoing?.manifest.sha256 ?? ""}`);
    await this.home.store.set({ ...changes, [key]: { header: encode(whole), payload: payload ?? new Uint8Array(0) } });
    this.parcels.push({ key, header: whole, payload: payload ?? new Uint8Array(0), due: 0, pause: REPEAT_S, outgoing });
  }

  /** Announce what is due, ever less often. */
  announce(now) {
    for (const parcel of this.parcels)
      if (now >= parcel.due) {
        parcel.due = now + this.home.jitter.around(parcel.pause);
        parcel.pause = Math.min(2 * parcel.pause, REPEAT_MAX_S);
        this.home.send(encode(this.#fresh(parcel)));
      }
  }

  /** Announce everything at the next opportunity. */
  rush() {
    for (const parcel of this.parcels) [parcel.due, parcel.pause] = [0, REPEAT_S];
  }

  /** Send the chunks asked for, but for those that are on their way to the server. @returns {number} bytes sent */
  serve(request, now) {
    const parcel = this.parcels.find(({ header }) => header.payload?.sha256 === request.sha256);
    if (!parcel) throw new WireError(`it asks for transfer ${request.sha256}, which is not here`);
    const outgoing = this.#outgoing(parcel);
    if (!outgoing.isOf(request)) {
      [parcel.due, parcel.pause] = [0, REPEAT_S]; // it knows chunks of another size
      return 0;
    }
    parcel.due = now + SERVED_S;
    let sent = 0;
    for (const chunk of outgoing.chunks(request))
      if (this.home.link.once(`${chunk.sha256}/${chunk.index}/${chunk.data.length}`, this.home.up, encode(chunk))) sent += chunk.data.length;
    return sent;
  }

  /** The parcel that a verdict is about, taken out; the caller forgets it in the store. */
  settle(verdict) {
    const at = this.parcels.findIndex(({ header }) => (header.payload?.sha256 ?? "") === verdict.digest && (verdict.task_id ? taskIdOf(header) === verdict.task_id : header.round === verdict.round));
    return at < 0 ? null : this.parcels.splice(at, 1)[0];
  }

  /** Let go of everything of a task. */
  async drop(taskId) {
    const gone = this.parcels.filter(({ header }) => taskIdOf(header) === taskId);
    this.parcels = this.parcels.filter((parcel) => !gone.includes(parcel));
    await this.home.store.set(Object.fromEntries(gone.map(({ key }) => [key, undefined])));
  }

  #fresh(parcel) {
    return parcel.header.type === "report" ? parcel.header : { ...parcel.header, payload: this.#outgoing(parcel).manifest };
  }

  #outgoing(parcel) {
    const { chunkBytes } = this.home.link;
    if (parcel.outgoing?.manifest.chunk_bytes !== chunkBytes) parcel.outgoing = new Outgoing(parcel.payload, chunkBytes);
    return parcel.outgoing;
  }
}

function parcelOf(key, entry) {
  try {
    const header = decode(entry.header), isRight = header.type === "report" || sha256Hex(entry.payload) === header.payload.sha256;
    return isRight ? { key, header, payload: entry.payload, due: 0, pause: REPEAT_S, outgoing: null } : null;
  } catch {
    return null;
  }
}
