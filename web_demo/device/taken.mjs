/** The newest that a device has taken of a job's signed words, kept over restarts: what is older is not taken again. */
import { StateError } from "../engine/errors.mjs";
import { isBefore } from "../wire/seal.mjs";

export class Taken {
  /** @param {import("./store.mjs").Store} store @param {{job: string, deviceId: string}} whose */
  constructor(store, { job, deviceId }) {
    [this.store, this.job, this.key] = [store, job, `signed/${job}/${deviceId}`];
    /** @type {import("../wire/seal.mjs").Stamp} */
    this.newest = { start: 0n, number: 0n };
    /** (round, version) of the newest offer by role. @type {Record<string, [number, number]>} */
    this.places = {};
  }

  /** Read what was kept; StateError if it is damaged. */
  async open() {
    const kept = await this.store.get(this.key);
    if (kept === undefined) return this;
    if (!isRight(kept)) throw new StateError(`what this device has taken in job ${this.job} is damaged; delete everything kept here to start afresh`);
    [this.newest, this.places] = [{ start: kept.start, number: kept.number }, kept.places];
    return this;
  }

  /** A message with this stamp is taken; another start of the aggregator is kept at once. */
  async advance(stamp) {
    const isNewStart = stamp.start > this.newest.start;
    if (isBefore(this.newest, stamp)) this.newest = stamp;
    if (isNewStart) await this.#keep();
  }

  /** Why an offer comes too late, newer work having been taken; empty if it does not. */
  behind(offer) {
    const [round, version] = this.places[offer.role] ?? [0, 0];
    if (offer.round >= round && offer.version >= version) return "";
    return `round ${offer.round} from version ${offer.version} is older than what this device has taken in job ${this.job}, round ${round} from version ${version}; a job that begins anew needs another name`;
  }

  /** Keep that an offer is taken; once this ends, its work may begin. */
  async take({ role, round, version }) {
    const known = this.places[role];
    if (known?.[0] === round && known[1] === version) return;
    this.places[role] = [round, version];
    await this.#keep();
  }

  /** Nothing said until now is to be taken again, also after a restart. */
  async close() {
    this.newest = { ...this.newest, number: this.newest.number + 1n };
    await this.#keep();
  }

  #keep = () => this.store.set({ [this.key]: { ...this.newest, places: this.places } });
}

const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
const isRight = (kept) =>
  [kept?.start, kept?.number].every((value) => typeof value === "bigint" && value >= 0n) && typeof kept.places === "object" && kept.places !== null &&
  Object.values(kept.places).every((place) => Array.isArray(place) && place.length === 2 && place.every(isCount));
