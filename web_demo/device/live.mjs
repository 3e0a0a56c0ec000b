/** A device from its connection to the end of its job: polls when something is due, and sleeps until a message comes. */
import { breathe } from "./bench.mjs";
import { Link } from "./link.mjs";

const SLEEP_MAX_S = 5;

/**
 * @param {{mqtt: object, url: string, username?: string, password?: string, reconnectS?: [number, number], home: import("./home.mjs").Home,
 *   agent: import("./agent.mjs").Agent, signal?: AbortSignal, clock?: () => number}} given
 * @returns {Promise<string>} why it ended; TransportError if the server refuses it
 */
export async function live({ mqtt, url, username, password, reconnectS, home, agent, signal, timeoutS = 30, clock = () => performance.now() / 1000 }) {
  const will = { topic: home.statusTopic, payload: home.status(false) }, topics = [home.down, home.aggregator];
  const link = new Link(mqtt, { url, username, password, reconnectS, clientId: `fleetune-${home.job}-${home.deviceId}`, topics, will });
  home.link = link;
  await agent.open();
  await link.open(timeoutS);
  home.onEvent({ kind: "connected", round: 0, text: url });
  try {
    while (!agent.finished && !signal?.aborted) {
      if (link.failure) throw link.failure;
      const hasMore = await agent.poll(clock());
      await breathe();
      const wait = Math.min(agent.dueAt(clock()) - clock(), SLEEP_MAX_S);
      if (!hasMore && wait > 0) await sleep(link, wait, signal);
    }
    if (signal?.aborted) await agent.current?.run?.checkpoint();
  } finally {
    await goodbye(link, home, Boolean(agent.finished));
  }
  return agent.finished;
}

/** Say that it is offline; when its job is over nothing of it stays at the server. */
async function goodbye(link, home, isOver) {
  if (link.isOpen) {
    const said = [link.publish(home.statusTopic, home.status(false), { retain: !isOver })];
    if (isOver) said.push(link.publish(home.statusTopic, new Uint8Array(0), { retain: true }));
    await Promise.race([Promise.all(said), new Promise((resolve) => setTimeout(resolve, 2000))]);
  }
  await link.close();
}

function sleep(link, seconds, signal) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      link.wake = () => {};
      signal?.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, 1000 * seconds);
    link.wake = end;
    signal?.addEventListener("abort", end);
  });
}
