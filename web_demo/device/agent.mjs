/**
 * A device's life in one job: messages in, messages out, a step of work in between; as Python's `agent`. No socket and no clock of its
 * own: `poll` is given the time in seconds.
 */
import { fitAdapter } from "../engine/artifact.mjs";
import { ArtifactError, ConfigError, DataError, oneLine, WireError } from "../engine/errors.mjs";
import { readTensors, writeTensors } from "../engine/safetensors.mjs";
import { sha256Hex } from "../engine/sha256.mjs";
import { filledWork, unsupported } from "../engine/work.mjs";
import { applyDelta, bytesMax, makeCodec } from "../wire/codecs/codecs.mjs";
import { encode, REASON_CHARS_MAX, taskIdOf } from "../wire/messages.mjs";
import { Pull, STALL_S } from "../wire/pull.mjs";
import { modulusBits } from "../wire/sums/grid.mjs";
import { Deliveries } from "./deliveries.mjs";
import { guardOf } from "./guard.mjs";
import { LocalRun, SUMMED } from "./local_run.mjs";
import { Masking } from "./masking.mjs";
import { CodecMemory } from "./memory.mjs";
import { checkTerms, MASKED } from "./terms.mjs";

const MESSAGES_A_POLL = 64, DEADLINE_GRACE_S = 5, SPREAD_S = 1, FRESH_S = 5, SLACK_BYTES = 64 * 1024, LEFT_MAX = 500;
const OURS = [ConfigError, DataError, ArtifactError, WireError];

export class Agent {
  /**
   * @param {import("./home.mjs").Home} home with its link
   * @param {import("./bench.mjs").Bench} bench
   * @param {() => string[]} [rules] why it may not work now; empty if it may
   */
  constructor(home, bench, rules = () => []) {
    Object.assign(this, { home, bench, rules });
    this.deliveries = new Deliveries(home);
    this.memory = new CodecMemory(home);
    this.masking = new Masking(home);
    this.guard = guardOf(home);
    const arrays = home.artifact.adapter(), content = writeTensors(arrays);
    this.original = { arrays, content, digest: sha256Hex(content) };
    /** Why it may stop; empty as long as it may not. */
    [this.finished, this.isUnwanted] = ["", false];
    [this.version, this.newestRound, this.held, this.wantsWhole, this.session, this.paused] = [-1, -1, null, false, "", ""];
    [this.connections, this.greetsAt, this.greetedAt, this.helloDue, this.pauseS] = [-1, Infinity, -Infinity, 0, home.helloS];
    this.done = new Set();
    this.askedAgain = new Set();
    /** @type {{offer: object, key: string, deadline: number, pull: Pull|null, run: LocalRun|null, since: number}|null} */
    this.current = null;
  }

  /** Take up what the store holds. */
  async open() {
    await this.guard.open();
    await this.deliveries.open();
    await this.masking.open();
    const content = await this.home.store.get(this.home.key("adapter"));
    this.held = content instanceof Uint8Array && this.#parsed(content) ? { content, digest: sha256Hex(content) } : { content: this.original.content, digest: this.original.digest };
    this.hasMet = Boolean(await this.home.store.get(this.home.key("session")));
    this.left = await this.home.store.get(this.home.key("left"));
  }

  /** Take what has come, announce what is due, do one step of work; true if there is more to do at once. */
  async poll(now) {
    await this.#mindRules();
    await this.#greet(now);
    for (let i = 0; i < MESSAGES_A_POLL && this.home.link.mail.length; i++) {
      const { topic, payload } = this.home.link.mail.shift();
      await this.#take(topic, payload, now);
    }
    if (this.home.link.isOpen) {
      this.deliveries.announce(now);
      this.masking.announce(now);
    }
    if (this.finished) return false;
    if (this.current?.run?.isWaiting && now >= this.current.deadline + DEADLINE_GRACE_S) await this.#decline("its masks did not come in time");
    if (this.paused && this.current && now >= this.current.deadline + DEADLINE_GRACE_S) await this.#decline(`paused: ${this.paused}`);
    if (this.current?.pull) return this.#fetch(now);
    return !this.paused && this.#step();
  }

  /** Time from which `poll` has something to do even if no message comes. */
  dueAt(now) {
    const { current, home } = this;
    if (this.finished) return Infinity;
    if (home.link.mail.length || (home.link.isOpen && home.link.connections !== this.connections)) return now;
    const work = !current ? Infinity : current.pull ? (current.pull.done ? now : current.pull.dueAt) : this.paused || current.run?.isWaiting ? current.deadline + DEADLINE_GRACE_S : now;
    if (!home.link.isOpen) return work; // what comes, and the connection itself, wakes it
    return Math.min(work, this.greetsAt, Math.max(this.helloDue, this.#waitsUntil()), this.deliveries.dueAt, this.masking.dueAt);
  }

  #waitsUntil = () => (!this.current ? -Infinity : this.current.pull ? this.current.pull.waitsUntil : Infinity);

  async #mindRules() {
    const paused = this.rules().join("; ");
    if (paused === this.paused) return;
    this.paused = paused;
    if (this.home.link.isOpen) this.#tellStatus();
    this.home.onEvent({ kind: paused ? "paused" : "resumed", round: Math.max(0, this.newestRound), text: paused });
    if (paused) await this.current?.run?.checkpoint();
  }

  #tellStatus = () => this.home.link.publish(this.home.statusTopic, this.home.status(true, this.paused), { retain: true });

  async #greet(now) {
    const { link, helloS, jitter } = this.home;
    if (!link.isOpen) return;
    if (link.connections !== this.connections) {
      this.connections = link.connections;
      this.#tellStatus();
      this.#returnTo(now);
    }
    const wasAway = now >= this.greetsAt;
    if (!wasAway && now < Math.max(this.helloDue, this.#waitsUntil())) return;
    [this.greetsAt, this.greetedAt, this.pauseS] = [Infinity, now, jitter.around(helloS)];
    this.helloDue = now + this.pauseS;
    const holds = this.wantsWhole ? "" : this.held.digest, original = holds && holds !== this.original.digest ? this.original.digest : "";
    this.home.send(encode({ type: "hello", device_id: this.home.deviceId, artifact: this.home.artifact.digest, role: this.home.role,
      num_samples: this.bench.numSamples, version: this.version, holds, original,
      connection: this.home.session && `${this.home.session}-${this.connections}` }));
    this.deliveries.rush();
    this.masking.rush();
    if (wasAway) this.current?.pull?.restart(now);
  }

  /** Say hello soon: either side was away, and all devices notice now. */
  #returnTo(now) {
    const isAlone = now - this.greetedAt < FRESH_S || this.greetedAt === -Infinity;
    this.greetsAt = Math.min(this.greetsAt, now + (isAlone ? 0 : this.home.jitter.within(SPREAD_S)));
  }

  async #take(topic, payload, now) {
    if (![this.home.down, this.home.aggregator].includes(topic) || !payload.length) return;
    try {
      const message = await this.guard.read(topic, payload, now, this.#sendDecline);
      if (!message) return;
      if (message.job !== undefined && message.job !== this.home.job) throw new WireError(`it names job ${message.job}`);
      if (message.type !== "chunk" || this.current?.pull) this.helloDue = Math.max(this.helloDue, now + this.pauseS);
      await this.#dispatch(message, now);
    } catch (error) {
      if (!OURS.some((kind) => error instanceof kind)) throw error;
      this.home.onEvent({ kind: "dropped", round: Math.max(0, this.newestRound), text: error.message });
    }
  }

  #dispatch(message, now) {
    switch (message.type) {
      case "aggregator_status": return this.#heard(message, now);
      case "offer": return this.#offered(message, now);
      case "chunk": return this.current?.pull?.sha256 === message.sha256 && this.current.pull.add(message, now);
      case "request": return this.#serve(message, now);
      case "mask_group":
      case "mask_inbox":
      case "mask_ask": return this.#takeMasks(message);
      case "verdict": return this.#settle(message);
      case "finished": return this.#finish(message.reason || "the job is over", message.is_error);
      default: throw new WireError(`a device takes no ${message.type}`);
    }
  }

  /** Take what is said of masks; a group whose keys nobody vouches for has the offer declined. WireError as Masking's. */
  async #takeMasks(message) {
    try {
      await this.masking.take(message);
    } catch (error) {
      if (!(error instanceof ConfigError) || !this.current) throw error;
      await this.#decline(error.message); // it may be otherwise in the next round
    }
  }

  #serve(request, now) {
    const bytes = this.deliveries.serve(request, now);
    if (bytes) this.home.onEvent({ kind: "sent", round: Math.max(0, this.newestRound), bytes });
  }

  async #heard({ session, online, finished }, now) {
    if (this.finished) return;
    if (finished && this.hasMet && this.left !== session) return this.#finish("the job is over", false, session);
    if (finished || !online || session === this.session) return;
    [this.session, this.hasMet, this.newestRound] = [session, true, -1];
    this.done.clear();
    this.#returnTo(now);
    await this.home.store.set({ [this.home.key("session")]: session });
    this.home.onEvent({ kind: "aggregator", round: 0, text: "here" });
  }

  async #offered(offer, now) {
    if (offer.role !== this.home.role) throw new WireError(`offer to ${offer.role}; this device's role is ${this.home.role}`);
    const tooLate = await this.guard.admits(offer);
    if (tooLate) return this.#sendDecline(offer, tooLate);
    offer = { ...offer, work: filledWork(offer.work), task_id: offer.task_id || `${offer.role}-${offer.role === "train" ? offer.round : offer.version}-${this.home.deviceId}` };
    const key = keyOf(offer), deadline = offer.deadline_s > 0 ? now + offer.deadline_s : Infinity, { current } = this;
    if (current?.key === key) {
      current.deadline = deadline;
      if (current.pull && offer.adapter.chunk_bytes !== current.offer.adapter.chunk_bytes && offer.adapter.sha256 === current.offer.adapter.sha256)
        [current.pull, current.offer] = [current.pull.cutAnew(offer.adapter, { sizeBytesMax: this.#sizeMax(offer), now }), offer];
      return;
    }
    if (this.done.has(key) || offer.round < this.newestRound) return;
    if (this.deliveries.holds(offer.task_id)) {
      if ((await this.home.store.get(this.home.key(`made/${offer.task_id}`))) === key) return this.deliveries.rush();
      await this.deliveries.drop(offer.task_id);
    }
    await this.#begin({ offer, key, deadline, pull: null, run: null, since: now }, now);
  }

  async #begin(assignment, now) {
    const { offer, key } = assignment, content = this.#find(wantedOf(offer));
    if (!content && offer.reference && (this.wantsWhole || !this.#find(offer.reference))) return this.#askAgain(key);
    if (offer.round > this.newestRound) {
      this.done.clear();
      this.askedAgain.clear();
    }
    this.newestRound = offer.round;
    this.current = assignment;
    this.home.onEvent({ kind: "offer", round: offer.round, version: offer.version, role: offer.role });
    try {
      const missing = offer.role === "train" ? unsupported(offer.work) : [];
      if (offer.mask_sha256) missing.push("a mask of what trains");
      if (missing.length) throw new ConfigError(`not done by a device in JavaScript: ${missing.join("; ")}; fleetune device does it`);
      const { codec, codec_ratio, codec_bits } = offer.work, isSummed = offer.role === "train" && SUMMED.includes(codec);
      if (isSummed) modulusBits(offer.grid);
      else if (offer.role === "train") makeCodec(codec, codec_ratio, codec_bits);
      checkTerms(this.home.terms, offer.work, offer.role, this.bench.numSamples);
      if (isSummed && codec === MASKED) await this.masking.begin(offer, key);
      if (content) await this.#start(assignment, content, 0);
      else assignment.pull = new Pull(offer.adapter, { sizeBytesMax: this.#sizeMax(offer), now, stallS: this.home.jitter.around(STALL_S) });
    } catch (error) {
      await this.#declineFor(error);
    }
  }

  async #fetch(now) {
    const { current } = this, request = current.pull.due(now);
    if (request) this.home.send(encode(request));
    if (!current.pull.done) return false;
    try {
      const content = this.#opened(current.offer, current.pull.content());
      if (!content) {
        this.current = null;
        this.#askAgain(current.key);
        return false;
      }
      await this.#start(current, content, now - current.since);
    } catch (error) {
      await this.#declineFor(error);
    }
    return this.current !== null;
  }

  async #start(assignment, content, fetchS) {
    const reference = this.#parsed(content);
    if (!reference) throw new WireError("adapter: what was sent is not this artifact's");
    assignment.pull = null;
    this.version = assignment.offer.version;
    this.held = { content, digest: sha256Hex(content) };
    await this.home.store.set({ [this.home.key("adapter")]: content });
    const { home, bench, memory, masking } = this;
    assignment.run = new LocalRun(assignment.offer, reference, { home, bench, memory, masking, key: assignment.key, fetchS });
  }

  /** The adapter file that an offer means; null if only the whole will do from now on. */
  #opened(offer, payload) {
    const wanted = wantedOf(offer);
    if (offer.down_codec === "full") {
      if (sha256Hex(payload) !== wanted) throw new WireError(`adapter: SHA-256 of what was sent is not ${wanted}`);
      return payload;
    }
    try {
      const held = this.#parsed(this.#find(offer.reference) ?? new Uint8Array(0));
      if (!held) throw new WireError("the adapter that it is a difference from is not held any more");
      const content = applyDelta(makeCodec(offer.down_codec, offer.down_ratio, offer.down_bits), payload, held);
      if (sha256Hex(content) === wanted) return content;
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
    }
    this.wantsWhole = true;
    return null;
  }

  async #step() {
    const { current } = this;
    if (!current?.run || current.run.isWaiting) return false;
    try {
      const product = await current.run.step();
      if (product) await this.#handOver(product, current);
    } catch (error) {
      await this.#declineFor(error);
    }
    return this.current !== null && !this.current.run?.isWaiting;
  }

  async #handOver({ header, payload, memory, left, event }, { offer, key }) {
    const log = (await this.home.store.get(this.home.key("left_log"))) ?? [];
    const line = { ...left, when: new Date().toISOString(), job: offer.job, round: offer.round, task: offer.task_id, bytes: payload?.length ?? 0, digest: payload ? sha256Hex(payload) : "", verdict: "" };
    await this.deliveries.put(header, payload, {
      ...(memory ? this.memory.kept(offer.round, memory) : {}), [this.home.key(`made/${offer.task_id}`)]: key, [this.home.key("checkpoint")]: undefined,
      [this.home.key("left_log")]: [...log, line].slice(-LEFT_MAX),
    });
    this.current = null;
    this.home.onEvent(event);
  }

  async #settle(verdict) {
    const parcel = this.deliveries.settle(verdict);
    if (!parcel) return;
    const taskId = taskIdOf(parcel.header), made = this.home.key(`made/${taskId}`), log = (await this.home.store.get(this.home.key("left_log"))) ?? [];
    const newest = Math.max(this.newestRound, this.deliveries.newestRound);
    const key = await this.home.store.get(made), settled = parcel.header.type === "update" ? await this.memory.settled(verdict.round, verdict.accepted, newest) : {};
    for (const line of log) if (line.task === taskId && line.digest === verdict.digest) line.verdict = verdict.accepted ? "accepted" : "refused";
    await this.home.store.set({ ...settled, [parcel.key]: undefined, [made]: undefined, [this.home.key("left_log")]: log });
    if (key) this.done.add(key);
    this.home.onEvent({ kind: verdict.accepted ? "accepted" : "refused", round: verdict.round, text: verdict.reason });
  }

  #declineFor(error) {
    if (!OURS.some((kind) => error instanceof kind)) throw error;
    return this.#decline(error.message, /not enough memory/.test(error.message) ? "memory" : error instanceof ConfigError ? "work" : "");
  }

  /** Give the assignment up, so that nobody waits for it. */
  async #decline(reason, cause = "") {
    const { offer, key } = this.current;
    this.done.add(key);
    this.current = null;
    await this.home.store.set({ [this.home.key("checkpoint")]: undefined });
    this.#sendDecline(offer, reason, cause);
  }

  #sendDecline = (offer, reason, cause = "") => {
    const said = oneLine(reason, REASON_CHARS_MAX);
    this.home.send(encode({ type: "decline", device_id: this.home.deviceId, job: offer.job, task_id: offer.task_id, round: offer.round, reason: said, cause }));
    this.home.onEvent({ kind: "declined", round: offer.round, text: said });
  };

  /** Say hello, once for an offer: it tells what is here, and the aggregator offers again. */
  #askAgain(key) {
    if (!this.askedAgain.has(key)) this.greetsAt = -Infinity;
    this.askedAgain.add(key);
  }

  async #finish(reason, isUnwanted, session = this.session) {
    if (this.finished) return;
    if (!isUnwanted) await this.home.store.set({ [this.home.key("left")]: session });
    await this.guard.close();
    await this.masking.forget();
    [this.finished, this.isUnwanted, this.current] = [reason, isUnwanted, null];
    this.home.onEvent({ kind: "finished", round: Math.max(0, this.newestRound), text: reason });
  }

  #find(digest) {
    return digest === this.held.digest ? this.held.content : digest === this.original.digest ? this.original.content : null;
  }

  #parsed(content) {
    try {
      return content === this.original.content ? this.original.arrays : fitAdapter(this.home.artifact.manifest, readTensors(content).arrays);
    } catch (error) {
      if (error instanceof ArtifactError) return null;
      throw error;
    }
  }

  #sizeMax = (offer) => (offer.down_codec === "full" ? this.original.content.length + SLACK_BYTES : bytesMax(this.original.arrays));
}

const wantedOf = (offer) => offer.adapter_sha256 || offer.adapter.sha256;

/** Key of all that decides what comes of an offer. */
function keyOf(offer) {
  const { job, task_id, version, role, work, memory, lazy, is_exact, grid } = offer, parts = [job, task_id, version, role, work, wantedOf(offer), memory, lazy, is_exact];
  return sha256Hex(new TextEncoder().encode(JSON.stringify(grid.bits ? [...parts, grid] : parts))).slice(0, 16);
}
