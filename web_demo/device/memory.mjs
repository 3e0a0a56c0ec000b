/** What a device's codec owes, round by round: kept until a verdict says whether the round counts. */
import { TYPES } from "../engine/arrays.mjs";

export class CodecMemory {
  /** @param {import("./home.mjs").Home} home */
  constructor(home) {
    this.home = home;
  }

  #key = (round) => this.home.key(`memory/${String(round).padStart(10, "0")}`);

  async #rounds() {
    return (await this.home.store.keys(this.home.key("memory/"))).map((key) => Number(key.slice(-10)));
  }

  /** What the newest round before this one left: `kind/tensor` -> array. @returns {Promise<import("../engine/arrays.mjs").Arrays>} */
  async before(round) {
    const newest = (await this.#rounds()).filter((number) => number < round).at(-1);
    const kept = newest === undefined ? {} : await this.home.store.get(this.#key(newest));
    return Object.fromEntries(Object.entries(kept ?? {}).filter(([name, value]) => name.includes("/") && TYPES[value?.dtype] && value.data instanceof TYPES[value.dtype]));
  }

  /** Changes of the store that keep what a round leaves. */
  kept = (round, arrays) => ({ [this.#key(round)]: Object.keys(arrays).length ? arrays : {} });

  /**
   * Changes of the store after a verdict: what the round left is void if it was refused, else what was before it is. It may be late: what
   * later rounds left stays up to `newest`, the last of this run of the job; what is beyond belongs to an earlier run.
   */
  async settled(round, isAccepted, newest = -1) {
    const isVoid = (number) => (isAccepted ? number < round : number === round), last = Math.max(round, newest);
    const gone = (await this.#rounds()).filter((number) => isVoid(number) || number > last);
    return Object.fromEntries(gone.map((number) => [this.#key(number), undefined]));
  }
}
