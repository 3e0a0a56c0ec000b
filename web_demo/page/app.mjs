/** The page: what a person does and sees; all work is the worker's. */

const $ = (id) => document.getElementById(id);
const worker = new Worker(new URL("worker.js", document.baseURI), { type: "module" });
const waiting = new Map();
/** Where the page is in the Android app: what keeps the app alive. */
const phone = globalThis.fleetuneApp;
const page = { losses: [], total: 0, mqtt: null, sent: 0 };
let asked = 0;

/** Ask the worker; what it finds, or an error with a sentence for the person. */
function ask(name, given = {}) {
  const id = ++asked;
  worker.postMessage({ id, do: name, ...given });
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

worker.onmessage = ({ data: { id, found, trouble, event, ...more } }) => {
  if (event) return EVENTS[event]?.(more);
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  trouble ? reject(new Error(trouble)) : resolve(found);
};
worker.onerror = (event) => {
  tell(`the worker cannot start: ${event.message || "its script was not found"}; load the page again, in a browser of 2023 or later`);
  [$("loading").hidden, $("model").textContent] = [true, "The model is not loaded."];
};

const EVENTS = {
  loading({ done, all }) {
    [$("loading").value, $("loading").max] = [done, all];
  },
  step({ step, totalSteps, loss }) {
    page.losses[step] = loss;
    draw(step + 1, totalSteps);
  },
  measured({ when, accuracy, loss }) {
    $(`accuracy-${when}`).textContent = accuracy === undefined ? "too few texts" : `${(100 * accuracy).toFixed(1)} %`;
    $(`loss-${when}`).textContent = loss === undefined ? "–" : loss.toFixed(3);
  },
  engine: ({ said }) => ($("facts").textContent += ` ${said}.`),
  resting: ({ reasons }) => say(`Waiting: ${reasons.join("; ")}.`),
  device({ kind, round, step, steps, loss, text, bytes }) {
    if (kind === "step") {
      if (step === 1) page.losses = [];
      page.losses[step - 1] = loss;
      draw(step, steps);
      return say(`Round ${round}: step ${step} of ${steps}.`);
    }
    if (kind === "sent") page.sent += bytes;
    const said = {
      connected: "Connected; waiting for the aggregator.", aggregator: "The aggregator is here; waiting for work.", offer: `Round ${round} is offered.`,
      restored: `Round ${round} goes on at step ${step}.`, trained: `Round ${round} is trained; its update is announced.`, sent: `Round ${round}: ${page.sent.toLocaleString("en")} bytes of updates are sent.`,
      accepted: `Round ${round}: the update is accepted.`, refused: `Round ${round}: the update is refused: ${text}`, declined: `Round ${round} is declined: ${text}`,
      evaluated: `Round ${round} is measured.`, untrusted: `A message is not taken: ${text}.`, trusts: `Connecting; only work that key ${text} signed is taken.`,
      finished: `Finished: ${text}.`, paused: `Waiting: ${text}.`, resumed: "Goes on.",
    }[kind];
    if (said) say(said);
    if (["trained", "accepted", "refused", "finished"].includes(kind)) showLeft();
  },
};

const say = (text) => ($("state").textContent = text);
function tell(text) {
  const begin = /^[a-z]+[ ,;]/.test(text) ? text[0].toUpperCase() : text[0]; // the name of a file stays as it is
  $("trouble").textContent = text ? `${begin}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "";
  $("trouble").hidden = !text;
}

/** Run something a person asked for; an error is a sentence. */
function doing(run) {
  return async (event) => {
    event?.preventDefault();
    tell("");
    try {
      await run(event);
    } catch (error) {
      tell(error.message);
    }
  };
}

function draw(done, total) {
  [$("progress").value, $("progress").max] = [done, total];
  const known = page.losses.filter((loss) => loss !== undefined), top = Math.max(...known), low = Math.min(...known, top - 1e-6);
  const points = page.losses.map((loss, i) => (loss === undefined ? "" : `${(400 * i) / Math.max(1, total - 1)},${110 - (100 * (loss - low)) / (top - low)}`));
  $("line").setAttribute("points", points.join(" "));
  $("loss").textContent = `Loss ${known.at(-1).toFixed(4)} at step ${done} of ${total}; it began at ${known[0].toFixed(4)}.`;
}

const data = () => ({ content: $("lines").value, name: page.file ?? "your texts" });

const count = doing(async () => {
  const { samples, cut } = await ask("count", { data: data() });
  $("counted").textContent = `${samples} texts${cut ? `; ${cut} are longer than the model reads, and are cut` : ""}.`;
});

async function busy(run) {
  for (const button of document.querySelectorAll("#trainer button, #joiner button")) button.disabled = true;
  $("stop").disabled = false;
  phone?.training(true);
  try {
    return await run();
  } finally {
    phone?.training(false);
    for (const button of document.querySelectorAll("#trainer button, #joiner button")) button.disabled = false;
    $("stop").disabled = true;
  }
}

async function showLeft() {
  const { lines } = await ask("left"), sum = lines.reduce((total, line) => total + line.bytes, 0), body = $("left").tBodies[0];
  body.replaceChildren(...lines.toReversed().map((line) => {
    const row = document.createElement("tr");
    const cells = [line.when.replace("T", " ").slice(0, 19), `${line.job}, ${line.round}`, `${line.kind}${line.codec ? ` (${line.codec})` : ""}`, line.samples, line.bytes.toLocaleString("en"), line.verdict || "waits"];
    row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  }));
  $("left").hidden = !lines.length;
  $("left-sum").textContent = lines.length ? `${lines.length} updates of ${sum.toLocaleString("en")} bytes; never a text.` : "Nothing: 0 bytes.";
}

/** Why this device should rest: its battery, its network; a hidden tab trains on. */
async function watchRules() {
  const battery = await navigator.getBattery?.().catch(() => null), net = navigator.connection;
  const look = () => {
    const reasons = [];
    if (battery && !battery.charging && battery.level < 0.3) reasons.push("the battery is below 30 % and does not charge");
    if (net?.saveData || net?.type === "cellular") reasons.push("the network is metered");
    ask("rules", { reasons });
  };
  for (const name of ["chargingchange", "levelchange"]) battery?.addEventListener(name, look);
  net?.addEventListener?.("change", look);
  look();
}

$("file").onchange = doing(async () => {
  const [file] = $("file").files;
  if (!file) return;
  if (file.size > 64 * 2 ** 20) throw new Error(`${file.name} has ${file.size} bytes; at most 64 MB are read`);
  try {
    $("lines").value = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is not text in UTF-8; save it as JSON lines, CSV or TSV`);
  }
  page.file = file.name;
  await count();
});
$("lines").onchange = () => {
  page.file = undefined;
  count();
};
$("adder").onsubmit = doing(async () => {
  const quoted = (text) => `"${text.replaceAll('"', '""')}"`, lines = $("lines"), text = $("text").value.trim();
  if (!text) throw new Error("write a text first");
  const isJson = lines.value.trimStart().startsWith("{");
  if (!lines.value.trim()) lines.value = "text,label\n";
  if (!lines.value.endsWith("\n")) lines.value += "\n";
  lines.value += isJson ? `${JSON.stringify({ text, label: $("label").value })}\n` : `${quoted(text)},${quoted($("label").value)}\n`;
  $("text").value = "";
  $("text").focus();
  await count();
});
$("trainer").onsubmit = doing(() => busy(async () => {
  page.losses = [];
  say("Training.");
  const name = $("policy").value, work = { steps: $("steps").valueAsNumber, batch_size: $("batch").valueAsNumber, policy: { name, drop: name === "full" ? 0 : 0.5 } };
  const { done, steps } = await ask("train", { data: data(), work });
  say(done ? `Done: ${steps} steps.` : `Paused after ${steps} steps; train again to go on.`);
}));
$("joiner").onsubmit = doing(() => busy(async () => {
  say("Connecting.");
  const given = Object.fromEntries(["job", "name", "username", "password", "trust", "authority"].map((id) => [id, $(id).value]));
  for (const id of ["certificate", "key"]) given[id] = (await $(id).files[0]?.text()) ?? "";
  const { ended } = await ask("join", { data: data(), url: page.mqtt, few: $("few").checked, masked: $("masked").checked, ...given });
  say(ended ? `Finished: ${ended}.` : "Paused; join again to go on.");
}));
$("stop").onclick = doing(() => ask("stop"));
$("predictor").onsubmit = doing(async () => {
  const { answers } = await ask("predict", { text: $("ask").value });
  $("answers").replaceChildren(...answers.map(({ label, share }) => Object.assign(document.createElement("li"), { textContent: `${label}: ${(100 * share).toFixed(1)} %` })));
});
$("save").onclick = doing(async () => {
  const { content } = await ask("adapter"), link = Object.assign(document.createElement("a"), { download: "adapter_model.safetensors", href: URL.createObjectURL(new Blob([content])) });
  link.click();
  URL.revokeObjectURL(link.href);
});
$("forget").onclick = doing(async () => {
  await ask("forget");
  phone?.whenCharging(false);
  $("charging").checked = false;
  for (const id of ["lines", "text", "ask", "certificate", "key"]) $(id).value = "";
  for (const id of ["accuracy-before", "accuracy-after", "loss-before", "loss-after"]) $(id).textContent = "–";
  [page.losses, page.sent, page.file] = [[], 0, undefined];
  $("line").setAttribute("points", "");
  [$("answers").textContent, $("counted").textContent, $("forgotten").textContent, $("loss").textContent] = ["", "", "All deleted.", "No step is done."];
  await showLeft();
});

/** The key and the authority that were pinned for this job, or those that the server suggests: another one does not take their place by itself. */
async function showPin() {
  const pinned = await ask("pinned", { job: $("job").value }), others = [];
  for (const [id, what] of [["trust", "key"], ["authority", "authority of certificates"]]) {
    $(id).value = pinned[id] || page[id];
    if (pinned[id] && page[id] && pinned[id].trim() !== page[id].trim()) others.push(what);
  }
  $("pin").textContent = others.length ? `This server now suggests another ${others.join(" and another ")} than the one that was pinned for this job; paste it here if its owner tells you so.` : "";
}
$("job").onchange = doing(showPin);

$("charging").onchange = () => phone.whenCharging($("charging").checked);

/** What `fleetune web` was started with. */
async function settingsOf() {
  let answer;
  try {
    answer = await fetch("settings.json");
    return await answer.json();
  } catch {
    throw new Error(`the server ${answer ? "does not give this page its settings" : "does not answer"}; is fleetune web still running? Load the page again when it is`);
  }
}

const begin = doing(async () => {
  const settings = await settingsOf(), found = await ask("open");
  page.mqtt = settings.mqtt;
  $("joiner").hidden = !settings.mqtt;
  if (settings.job) $("job").value = settings.job;
  [page.trust, page.authority] = [settings.trust ?? "", settings.mask_authority ?? ""];
  $("label").replaceChildren(...found.labels.map((label) => Object.assign(document.createElement("option"), { textContent: label, value: label })));
  $("name").value = found.joined?.name ?? found.name_;
  $("model").textContent = `${found.name}: ${found.layers} layers, ${found.labels.length} classes, ${found.baseDtype}, ${(found.bytes / 1e6).toFixed(1)} MB.`;
  $("facts").textContent = `Artifact ${found.digest.slice(0, 12)}; ${found.threads} thread${found.threads > 1 ? "s" : ""}${self.crossOriginIsolated ? "" : " (the page is not isolated)"}.`;
  [$("loading").hidden, $("main").hidden] = [true, false];
  if (found.kept !== true) tell(`${found.kept}; what you train is gone when this tab closes`);
  await watchRules();
  if (found.data) {
    [$("lines").value, page.file] = [found.data.content, found.data.name];
    await count();
  }
  await showLeft();
  if (phone) [$("phone").hidden, $("charging").checked] = [false, phone.isWhenCharging()];
  if (!found.joined && location.hash === "#resume") phone?.training(false);
  if (found.joined) $("job").value = found.joined.job;
  await showPin();
  if (found.joined) {
    $("few").checked = found.joined.few;
    $("masked").checked = Boolean(found.joined.masked);
    say("This device was in a job; it joins again.");
    $("joiner").requestSubmit();
  }
});
begin().then(() => {
  $("loading").hidden = true;
  if ($("main").hidden) $("model").textContent = "The model is not loaded.";
});
/** For tests: the golden step on this browser. */
globalThis.selfcheck = (given) => ask("selfcheck", given);
