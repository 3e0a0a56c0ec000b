/** What the parts of a device share: who it is, its link, its store, its owner's terms. */
import { Jitter } from "./jitter.mjs";
import { PLAIN_TERMS } from "./terms.mjs";
import { aggregatorTopic, encode, isName, topicOf } from "../wire/messages.mjs";
import { ConfigError, oneLine } from "../engine/errors.mjs";

export class Home {
  /**
   * @param {{deviceId: string, job: string, artifact: import("../engine/artifact.mjs").Artifact, role?: string, store: import("./store.mjs").Store,
   *   terms?: Partial<import("./terms.mjs").Terms>, checkpointEvery?: number, helloS?: number, session?: string,
   *   trusted?: import("./trusted.mjs").Trusted|null, voucher?: import("../wire/sums/vouching.mjs").Voucher|null,
   *   authorities?: import("../wire/sums/vouching.mjs").Authorities|null, facts?: import("./store.mjs").Store,
   *   onEvent?: (event: {kind: string, round: number} & Record<string, unknown>) => void}} given `trusted`: keys of the
   *   aggregator, null for any; `voucher`: what vouches for its keys under masks; `authorities`: of which one must vouch for others' keys, null
   *   to mask with any; `facts`: what is kept beside them, whatever the artifact
   */
  constructor({ deviceId, job, artifact, role = "train", store, trusted = null, voucher = null, authorities = null, facts = store, terms = {}, checkpointEvery = 20, helloS = 30, session, onEvent = () => {} }) {
    for (const [kind, name] of [["device", deviceId], ["job", job]])
      if (!isName(name)) throw new ConfigError(`${kind} ${oneLine(JSON.stringify(name), 80)}: use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit`);
    Object.assign(this, { deviceId, job, artifact, role, store, trusted, voucher, authorities, facts, checkpointEvery, helloS, onEvent });
    this.session = session ?? Math.random().toString(16).slice(2, 18);
    this.terms = { ...PLAIN_TERMS, ...terms };
    this.jitter = new Jitter(deviceId);
    this.up = topicOf(job, deviceId, "up");
    this.down = topicOf(job, deviceId, "down");
    this.aggregator = aggregatorTopic(job);
    this.statusTopic = topicOf(job, deviceId, "status");
    /** @type {import("./link.mjs").Link} */
    this.link = null;
  }

  /** Key of the store for this job, artifact and device. */
  key = (name) => `${this.job}/${this.artifact.digest}/${this.deviceId}/${name}`;

  status = (online, paused = "") => encode({ type: "device_status", device_id: this.deviceId, online, paused, session: this.session });

  /** To the aggregator. @param {Uint8Array} payload */
  send = (payload) => this.link.publish(this.up, payload);
}
