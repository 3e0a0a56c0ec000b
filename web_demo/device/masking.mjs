/**
 * A device's part in a sum under masks: its keys, the shares of its secrets, and what it tells of others' shares, once; as Python's
 * `agent/masking`. All of it is in the store before any of it is sent: a page that is closed goes on with the same keys, gives the
 * same shares, and tells of each device one kind of share at most.
 */
import { ConfigError, some, WireError } from "../engine/errors.mjs";
import { encode } from "../wire/messages.mjs";
import { digestOfSeed, newSecret, needX25519, publicOf, seal, unseal } from "../wire/sums/keys.mjs";
import { mask } from "../wire/sums/masking.mjs";
import { SHARE_BYTES, split } from "../wire/sums/shares.mjs";
import { problemOfPeer } from "../wire/sums/vouching.mjs";

const REPEAT_S = 5, REPEAT_MAX_S = 60, FORMAT = 1;
/** With fewer, whoever masks with this device could take its update from their sum. */
const FEWEST_PEERS = 2;

export class Masking {
  /** @param {import("./home.mjs").Home} home */
  constructor(home) {
    [this.home, this.state, this.due, this.pause] = [home, null, 0, REPEAT_S];
  }

  /** Take up what an earlier life has left. */
  async open() {
    const kept = await this.home.store.get(this.home.key("masks"));
    this.state = kept?.format === FORMAT ? kept : null;
  }

  /** Time of the next announcement; Infinity if nothing is waited for. */
  get dueAt() {
    return this.state && !this.state.inbox ? this.due : Infinity;
  }

  /**
   * Make keys for an offer, or go on with those that it has. ConfigError where there is no X25519; or others must be vouched for, and the
   * offer names no group, or one for which this device has made keys before.
   */
  async begin(offer, key) {
    if (this.state?.key !== key) {
      await needX25519();
      await this.#checkNew(offer);
      const [secret, shareSecret, seed] = [newSecret(), newSecret(), newSecret()], header = { job: offer.job, task_id: offer.task_id, round: offer.round };
      const own = { mask_key: await publicOf(secret), share_key: await publicOf(shareSecret) }, { deviceId, voucher } = this.home, offered = offer.mask_group;
      const vouched = offered && voucher ? await voucher.vouch({ job: offer.job, group: offered }, deviceId, own.mask_key, own.share_key) : {};
      const keys = { type: "mask_keys", device_id: deviceId, ...header, ...own, seed_digest: digestOfSeed(seed), ...vouched };
      await this.#keep({ format: FORMAT, key, header, offered, secret, shareSecret, seed, keys, group: null, shares: null, own: null, inbox: null, asked: null, reveal: null });
    }
    if (this.home.authorities) await this.home.facts.set({ [this.#newestKey]: offer.mask_group });
    this.rush();
  }

  get #newestKey() {
    return `masks/${this.home.job}/${this.home.deviceId}`;
  }

  /** ConfigError for a group that is none, or not newer than the last: told secrets of its keys would fit again. */
  async #checkNew({ job, mask_group: group }) {
    if (!this.home.authorities) return;
    const newest = (await this.home.facts.get(this.#newestKey)) ?? "", place = placeOf(group), last = placeOf(newest) ?? [-1, -1];
    if (!place) throw new ConfigError("masks: the aggregator names no group of an attempt, which certificates vouch for; it is of an earlier release");
    if (place[0] < last[0] || (place[0] === last[0] && place[1] <= last[1]))
      throw new ConfigError(`masks: keys for group '${newest}' of job '${job}' were made before this one's, '${group}'; a job that begins anew needs another name`);
  }

  /** ConfigError that names whose keys nobody vouches for. */
  async #checkPeers({ header, offered }, group) {
    const { authorities } = this.home, scope = { job: header.job, group: group.group };
    if (!authorities) return;
    if (group.group !== offered) throw new ConfigError(`masks: group '${group.group}'; this device's keys are for '${offered}'`);
    const told = await Promise.all(group.peers.map(async (peer) => [peer.device_id, (await problemOfPeer(scope, peer)) || (await authorities.problem(peer.certificate))]));
    const wrong = told.filter(([, problem]) => problem).map((row) => row.join(": "));
    if (wrong.length) throw new ConfigError(`masks: the keys told of ${some(wrong)}`);
  }

  /** Say again at the next opportunity what the aggregator may not know. */
  rush() {
    [this.due, this.pause] = [0, REPEAT_S];
  }

  /** Say what is due, ever less often. */
  announce(now) {
    if (now < this.dueAt) return;
    [this.due, this.pause] = [now + this.pause, Math.min(2 * this.pause, REPEAT_MAX_S)];
    this.#send(this.state.shares ?? this.state.keys);
  }

  /** Whether the update of the offer with this key can be masked. */
  isReady = (key) => this.state?.key === key && Boolean(this.state.inbox);

  /** Mask the numbers of the task, in place, once it is ready; WireError for a neighbour's key that is none. */
  async mask(numbers, grid) {
    const { group, inbox, secret, seed } = this.state ?? {};
    if (!group || !inbox) throw new WireError("there are no masks yet");
    const there = new Set(inbox.shares.map(({ place }) => place)), masker = { scope: this.#scope(), deviceId: this.home.deviceId, place: group.place, secret, seed };
    await mask(numbers, masker, group.peers.filter(({ place }) => there.has(place)), grid);
  }

  /** Take what the aggregator says of a group; WireError if it is of another, contradicts what was said before, or cannot be; ConfigError if nobody vouches for keys. */
  async take(message) {
    const { state } = this;
    if (!state || message.task_id !== state.header.task_id || message.round !== state.header.round) throw new WireError("masks of a task that this device is not at");
    if (message.type === "mask_group") return this.#join(message);
    if (message.group !== state.group?.group) throw new WireError("masks of a group that this device is not in");
    return message.type === "mask_inbox" ? this.#receive(message) : this.#answer(message);
  }

  /** Drop all secrets: nobody will ask any more. */
  async forget() {
    this.state = null;
    await this.home.store.set({ [this.home.key("masks")]: undefined });
  }

  #scope = () => ({ job: this.state.header.job, group: this.state.group.group });

  #told = (type, more) => ({ type, device_id: this.home.deviceId, ...this.state.header, group: this.state.group.group, ...more });

  /** Share this device's secrets with those of a group. */
  async #join(group) {
    const { state } = this, { deviceId } = this.home;
    if (state.group) {
      if (!same(state.group, group)) throw new WireError("the group is another than was told before");
      return this.rush();
    }
    checkGroup(group, deviceId, state.keys.mask_key);
    await this.#checkPeers(state, group);
    const holders = [...group.peers, group].map(({ place }) => place + 1), [seeds, secrets] = [state.seed, state.secret].map((one) => split(one, holders, group.threshold));
    const scope = { job: state.header.job, group: group.group }, shares = [];
    for (const { place, device_id, share_key } of group.peers)
      shares.push({ place, data: await seal(joined(seeds.get(place + 1), secrets.get(place + 1)), state.shareSecret, share_key, scope, { sender: deviceId, receiver: device_id }) });
    const told = { type: "mask_shares", device_id: deviceId, ...state.header, group: group.group, shares };
    await this.#keep({ ...state, group, shares: told, own: [seeds.get(group.place + 1), secrets.get(group.place + 1)] });
    this.rush();
  }

  /** Keep what others have sealed for this device: it masks with them. */
  async #receive(inbox) {
    const { state } = this, { group } = state, places = inbox.shares.map(({ place }) => place), known = new Set(group.peers.map(({ place }) => place));
    if (state.inbox) {
      if (!same(state.inbox, inbox)) throw new WireError("the group's shares are others than were told before");
      return;
    }
    if (new Set(places).size !== places.length || !places.every((place) => known.has(place))) throw new WireError("shares of places that are not of this device's group, or twice");
    if (places.length < Math.max(FEWEST_PEERS, group.threshold - 1)) throw new WireError(`${places.length} others mask with this device; the group's threshold is ${group.threshold}`);
    await this.#keep({ ...state, inbox });
  }

  /** Tell what is asked of others' shares, if it is the first question or the same again. */
  async #answer(ask) {
    if (this.state.asked) {
      if (!same(this.state.asked, ask)) throw new WireError("it asks for other shares than before: two kinds of one device would bare its update");
    } else {
      this.#checkAsk(ask);
      const shares = await this.#opened(), told = (places, at) => places.filter((place) => shares.has(place)).map((place) => ({ place, data: shares.get(place)[at] }));
      const reveal = this.#told("mask_reveal", { seeds: told(ask.delivered, 0), secrets: told(ask.dropped, 1) });
      await this.#keep({ ...this.state, asked: ask, reveal, secret: null, shareSecret: null, seed: null, own: null });
    }
    this.#send(this.state.reveal);
  }

  #checkAsk({ delivered, dropped }) {
    const { group, inbox } = this.state, named = [...delivered, ...dropped], masked = new Set(inbox ? [group.place, ...inbox.shares.map(({ place }) => place)] : []);
    if (new Set(named).size !== named.length || named.length !== masked.size || !named.every((place) => masked.has(place)))
      throw new WireError("it does not ask for one share of each device that masked with this one");
    if (!delivered.includes(group.place)) throw new WireError("it says that this device has dropped out, and asks it");
    if (delivered.length < group.threshold) throw new WireError(`${delivered.length} updates around this device; its threshold is ${group.threshold}`);
  }

  /** Shares of seed and secret by place; one that cannot be opened is left out. @returns {Promise<Map<number, Uint8Array[]>>} */
  async #opened() {
    const { group, inbox, own, shareSecret } = this.state, peers = new Map(group.peers.map((peer) => [peer.place, peer])), found = new Map([[group.place, own]]);
    for (const { place, data } of inbox.shares) {
      const { device_id, share_key } = peers.get(place);
      try {
        const text = await unseal(data, shareSecret, share_key, this.#scope(), { sender: device_id, receiver: this.home.deviceId });
        if (text.length !== 2 * SHARE_BYTES) throw new WireError(`shares of ${text.length} bytes; expected ${2 * SHARE_BYTES}`);
        found.set(place, [text.slice(0, SHARE_BYTES), text.slice(SHARE_BYTES)]);
      } catch (error) {
        if (!(error instanceof WireError)) throw error;
        this.home.onEvent({ kind: "dropped", round: this.state.header.round, text: `${device_id}: ${error.message}` });
      }
    }
    return found;
  }

  async #keep(state) {
    await this.home.store.set({ [this.home.key("masks")]: state });
    this.state = state;
  }

  #send = (message) => this.home.send(encode(message));
}

/** Round and first position of an attempt, by which groups follow each other; null for a name that is none. */
const placeOf = (group) => (/^\d+-\d+$/.test(group) ? group.split("-").map(Number) : null);
const joined = (a, b) => Uint8Array.from([...a, ...b]);
const textOf = (message) => JSON.stringify(message, (_, value) => (value instanceof Uint8Array ? [...value] : value));
const same = (a, b) => textOf(a) === textOf(b);

/** WireError for a group in which this device's update would not be hidden. */
function checkGroup({ peers, place, mask_key, threshold }, name, ownKey) {
  const holders = peers.length + 1;
  if (!same(mask_key, ownKey)) throw new WireError("the aggregator knows another key of this device: it has lost its masks");
  if (peers.length < FEWEST_PEERS) throw new WireError(`group with ${peers.length} others; at least ${FEWEST_PEERS}`);
  if (!(holders < 2 * threshold && threshold <= holders)) throw new WireError(`threshold ${threshold} of ${holders}: more than half, and no more than there are`);
  const places = new Set([place, ...peers.map((peer) => peer.place)]), names = new Set([name, ...peers.map((peer) => peer.device_id)]);
  const keys = new Set([textOf(ownKey), ...peers.map((peer) => textOf(peer.mask_key))]), shareKeys = new Set(peers.map((peer) => textOf(peer.share_key)));
  if (Math.min(places.size, names.size, keys.size, shareKeys.size + 1) !== holders) throw new WireError("group with a place, device or key twice");
}
