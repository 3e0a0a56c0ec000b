/** What a device takes from the wire: of an aggregator only what a pinned key signed, and nothing that is said again; as Python's `agent/guard`. */
import { decode } from "../wire/messages.mjs";
import { isBefore, parseSeal } from "../wire/seal.mjs";
import { Taken } from "./taken.mjs";

const WINDOW_S = 60;

/** The guard of a device, as its owner has it. @param {import("./home.mjs").Home} home */
export const guardOf = (home) => (home.trusted ? new Guard(home) : new OpenDoor());

/** Lets in all that can be decoded: the owner names no key. */
export class OpenDoor {
  open = async () => {};
  read = async (topic, payload) => decode(payload);
  admits = async () => "";
  close = async () => {};
}

export class Guard {
  /** @param {import("./home.mjs").Home} home with keys in `trusted` */
  constructor(home) {
    [this.home, this.trusted, this.taken] = [home, home.trusted, new Taken(home.facts, home)];
    /** @type {Map<string, number>} when each kind was told of */
    this.told = new Map();
  }

  /** Read what was kept; StateError if it is damaged. */
  async open() {
    await this.taken.open();
  }

  /** A message; null if it is not to be taken, which is told once a minute for each kind. WireError if it cannot be decoded. */
  async read(topic, payload, now, decline) {
    const seal = parseSeal(topic, payload);
    if (!seal) return this.#unsigned(topic, decode(payload), now);
    if (!this.trusted.knows(seal.keyId)) return this.#refuse("of another key", now, `key ${seal.keyId} signed it`);
    if (this.#isOld(topic, seal.stamp)) return this.#refuseOld(seal, payload, now, decline);
    if (!(await this.trusted.verify(seal))) return this.#refuse("of no key", now, forged(seal));
    await this.taken.advance(topic === this.home.aggregator ? { ...seal.stamp, number: 0n } : seal.stamp);
    return decode(payload);
  }

  /** Why work on an offer may not begin; empty if it may, which is kept. */
  async admits(offer) {
    if (offer.role !== this.home.role) return ""; // refused by its role
    const reason = this.taken.behind(offer);
    if (!reason) await this.taken.take(offer);
    return reason;
  }

  /** The word that the job is over was obeyed: said again, it is not. */
  close = () => this.taken.close();

  #unsigned(topic, message, now) {
    if (message.type === "chunk" && topic !== this.home.aggregator) return message; // its digest is in a signed offer
    if (message.type === "aggregator_status" && !message.session && !message.finished) return null; // a knock
    return this.#refuse(`${message.type}, not signed`, now, `${message.type} is not signed`);
  }

  /** Of a status, which is retained and may be older than an offer, the starts alone count. */
  #isOld(topic, stamp) {
    const { newest } = this.taken;
    return topic === this.home.aggregator ? stamp.start < newest.start : isBefore(stamp, newest);
  }

  /** Refuse unread, but for one a minute: the aggregator of a job that began anew is told why nobody works. */
  async #refuseOld(seal, payload, now, decline) {
    if (!this.#mayTell("old", now)) return null;
    if (!(await this.trusted.verify(seal))) return this.#say(forged(seal));
    this.#say(old(seal.stamp, this.taken.newest));
    const message = decode(payload), reason = message.type === "offer" && this.taken.behind(message);
    if (reason) decline(message, reason);
    return null;
  }

  #refuse(kind, now, said) {
    return this.#mayTell(kind, now) ? this.#say(said) : null;
  }

  #mayTell(kind, now) {
    const is = now - (this.told.get(kind) ?? -Infinity) >= WINDOW_S;
    if (is) this.told.set(kind, now);
    return is;
  }

  #say(said) {
    this.home.onEvent({ kind: "untrusted", round: 0, text: `${said}; job ${this.home.job} takes what key ${this.trusted.names} signs` });
    return null;
  }
}

const forged = ({ keyId }) => `key ${keyId} did not sign this for this topic`;
const old = (found, newest) =>
  `message ${found.number} of the aggregator's start ${found.start} is older than message ${newest.number} of start ${newest.start}: it was recorded and said again, or the job began anew in another folder and needs another name`;
