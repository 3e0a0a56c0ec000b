/** The one file that knows mqtt.js: MQTT 5 over WebSockets, reconnecting, with a last will; as Python's `network/link`. */
import { oneLine, TransportError } from "../engine/errors.mjs";
import { CHUNK_BYTES, MESSAGE_BYTES_MAX } from "../wire/messages.mjs";

const HEADER_BYTES = 1024, CHUNK_BYTES_MIN = CHUNK_BYTES / 32, RECONNECT_S = [0.5, 30], GROW_AFTER = 16;
const LOGIN = "the login is refused; look at the name and the password", BARRED = "it does not let this device in (not authorised); look at the user and the password";
const REFUSED = { 134: LOGIN, 135: BARRED, 4: LOGIN, 5: BARRED };
const TAKEN_OVER = 142;

export class Link {
  /**
   * @param {typeof import("mqtt").default} mqtt
   * @param {{url: string, clientId: string, topics: string[], will: {topic: string, payload: Uint8Array}, username?: string, password?: string,
   *   reconnectS?: [number, number]}} options
   */
  constructor(mqtt, options) {
    if (!/^wss?:\/\//.test(options.url)) throw new TransportError(`${oneLine(options.url)}: expected ws://host:port or wss://host:port; a page cannot speak mqtt://`);
    [this.mqtt, this.options, this.reconnectS] = [mqtt, options, options.reconnectS ?? RECONNECT_S];
    /** Messages that came and were not taken. @type {{topic: string, payload: Uint8Array}[]} */
    this.mail = [];
    [this.connections, this.chunkBytes, this.acknowledged, this.isOpen] = [0, CHUNK_BYTES, 0, false];
    /** Chunks on their way, by name. */
    this.underway = new Set();
    /** Why it will not connect again, once it will not. @type {Error|null} */
    this.failure = null;
    this.lastTrouble = "";
    this.wake = () => {};
  }

  /** Connect; TransportError for a refusal, or if nothing answers in time. */
  async open(timeoutS = 30) {
    const { url, clientId, topics, will, username, password } = this.options;
    const client = this.mqtt.connect(url, {
      clientId, protocolVersion: 5, clean: true, username, password, keepalive: 30, resubscribe: false, queueQoSZero: false, reconnectOnConnackError: false,
      reconnectPeriod: 1000 * this.reconnectS[0], connectTimeout: 10000, timerVariant: "native",
      properties: { maximumPacketSize: MESSAGE_BYTES_MAX + HEADER_BYTES }, will: { topic: will.topic, payload: toBuffer(will.payload), qos: 1, retain: true },
    });
    this.client = client;
    client.on("connect", (connack) => this.#connected(connack, topics));
    client.on("message", (topic, payload) => (this.mail.push({ topic, payload: new Uint8Array(payload) }), this.wake()));
    client.on("close", () => this.#closed());
    client.on("error", (error) => this.#troubled(error));
    client.on("disconnect", ({ reasonCode }) => reasonCode === TAKEN_OVER && this.#fail("another device of this name is connected; give each its own"));
    await this.#opened(timeoutS);
  }

  #opened(timeoutS) {
    return new Promise((resolve, reject) => {
      const advice = `no MQTT over WebSockets answers at ${this.options.url}; is the server there, with a listener of "protocol websockets"?`;
      const timer = setTimeout(() => this.#fail(`${advice}${this.lastTrouble && ` (${this.lastTrouble})`}`), 1000 * timeoutS);
      const before = this.wake;
      this.wake = () => {
        if (!this.isOpen && !this.failure) return;
        clearTimeout(timer);
        this.wake = before;
        this.failure ? reject(this.failure) : resolve();
      };
    });
  }

  #connected(connack, topics) {
    const most = connack.properties?.maximumPacketSize;
    if (most) this.chunkBytes = Math.max(CHUNK_BYTES_MIN, Math.min(this.chunkBytes, most - HEADER_BYTES));
    this.largest = most ? Math.min(CHUNK_BYTES, most - HEADER_BYTES) : CHUNK_BYTES;
    this.client.options.reconnectPeriod = 1000 * this.reconnectS[0];
    this.client.subscribe(topics, { qos: 1 }, (error, granted) => {
      const refused = (granted ?? []).filter(({ qos }) => qos >= 128).map(({ topic }) => topic);
      if (refused.length) return this.#fail(`the server's access list (ACL) does not let this client read ${refused.join(", ")}`);
      if (error) return this.#troubled(error);
      // Told only now: an answer to a hello would be lost before the server knows the subscription.
      [this.isOpen, this.connections] = [true, this.connections + 1];
      this.wake();
    });
  }

  #closed() {
    if (this.isOpen && this.underway.size) this.chunkBytes = Math.max(CHUNK_BYTES_MIN, Math.floor(this.chunkBytes / 2));
    [this.isOpen, this.acknowledged] = [false, 0];
    this.underway.clear();
    this.client.options.reconnectPeriod = Math.min(1000 * this.reconnectS[1], 2 * this.client.options.reconnectPeriod);
    this.wake();
  }

  #troubled(error) {
    this.lastTrouble = oneLine(error?.message || error?.code || String(error), 120);
    const said = REFUSED[error?.code];
    if (said && !this.connections) this.#fail(`${this.options.url}: ${said}`);
  }

  #fail(message) {
    this.failure = new TransportError(message);
    this.client.end(true);
    this.wake();
  }

  /** Hand a message over, QoS 1. @param {Uint8Array} payload @param {{retain?: boolean}} [options] */
  publish(topic, payload, { retain = false } = {}) {
    return new Promise((resolve) => this.client.publish(topic, toBuffer(payload), { qos: 1, retain }, (error) => {
      if (error && error.code >= 128) this.lastTrouble = `a message is refused: ${oneLine(error.message)}`;
      resolve(!error);
    }));
  }

  /** Send a thing in one message, unless it is still on its way to the server; true if it was sent now. */
  once(name, topic, payload) {
    if (this.underway.has(name)) return false;
    this.underway.add(name);
    this.publish(topic, payload).then((isTaken) => {
      this.underway.delete(name);
      if (isTaken && ++this.acknowledged % GROW_AFTER === 0) this.chunkBytes = Math.min(this.largest ?? CHUNK_BYTES, 2 * this.chunkBytes);
    });
    return true;
  }

  /** Cut the connection as a bad network does; it comes again. */
  cut() {
    this.client.stream.destroy();
  }

  /** Say goodbye, and stop. */
  async close() {
    await Promise.race([this.client.endAsync(false), new Promise((resolve) => setTimeout(resolve, 2000))]);
    this.client.end(true);
  }
}

/** What mqtt.js takes; it has a Buffer of its own in the page. */
function toBuffer(bytes) {
  return globalThis.Buffer ? globalThis.Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length) : bytes;
}
