"use strict";
// All that a device or an aggregator says is a stranger's text: it is set as textContent, and nothing here parses markup.
const EVERY_MS = 2000, ROWS_MAX = 500, SVG = "http://www.w3.org/2000/svg";
const KINDS = {
  gone: "bad", silent: "bad", late: "warn", slow: "warn", paused: "warn", "left out": "warn", refused: "bad",
  idle: "soft", online: "good",
};
const query = new URLSearchParams(location.search);
const byId = (id) => document.getElementById(id);

function make(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function size(mb) {
  if (mb >= 1000) return (mb / 1000).toFixed(2) + " GB";
  if (mb >= 1) return mb.toFixed(1) + " MB";
  return mb > 0 ? (mb * 1000).toFixed(mb < 0.01 ? 1 : 0) + " kB" : "";
}

function seconds(s) {
  if (s >= 5400) return (s / 3600).toFixed(1) + " h";
  if (s >= 90) return (s / 60).toFixed(0) + " min";
  return s.toFixed(s < 10 ? 1 : 0) + " s";
}

const kindOf = (state) => KINDS[state] || "busy";

function showJob(job) {
  byId("job").textContent = "job " + job.job;
  document.title = job.job + ": fleetune watch";
  const of = job.num_rounds ? " of " + job.num_rounds : "";
  const said = ["aggregator " + job.aggregator, "round " + job.round + of, "version " + job.version];
  if (job.is_open) {
    said.push(job.num_accepted + " updates taken, " + job.num_pending + " awaited, " + job.num_refused + " refused");
    if (job.left_s) said.push(job.left_s > 0 ? "closes in " + seconds(job.left_s) : "past its deadline");
  }
  if (job.dropped) said.push(job.dropped + " messages dropped");
  if (job.software) said.push("fleetune " + job.software);
  if (!job.is_told && job.aggregator === "here") said.push("no figures from this aggregator yet");
  byId("aggregator").textContent = said.join(" · ");
}

function showCounts(counts) {
  const items = Object.keys(counts).sort().map((state) => {
    const item = make("li");
    item.append(make("strong", String(counts[state])), " ", make("span", state, kindOf(state)));
    return item;
  });
  byId("counts").replaceChildren(...items);
}

function stepsOf(device) {
  const cell = make("td", "", "work");
  if (device.steps) {
    const bar = make("progress");
    bar.max = device.steps;
    bar.value = device.step;
    cell.append(bar, device.step + " of " + device.steps);
  } else if (device.step) cell.textContent = String(device.step);
  return cell;
}

function rowOf(device) {
  const row = make("tr");
  const work = device.phase ? device.phase + (device.round ? ", round " + device.round : "") : "";
  row.append(
    make("td", device.device_id), make("td", device.state, "state " + kindOf(device.state)), make("td", work, "work"),
    stepsOf(device), make("td", device.step_s ? device.step_s.toPrecision(3) : "", "n"),
    make("td", size(device.memory_mb), "n"),
    make("td", device.temperature_c ? device.temperature_c.toFixed(0) : "", "n"),
    make("td", size(device.mb_sent), "n"), make("td", size(device.mb_received), "n"),
    make("td", device.software, "soft"), make("td", seconds(device.heard_s) + " ago", "n soft"), make("td", device.why));
  return row;
}

function showDevices(devices) {
  const troubled = (device) => device.state in KINDS && !["idle", "online"].includes(device.state);
  const shown = devices.length > ROWS_MAX
    ? [...devices.filter(troubled), ...devices.filter((d) => !troubled(d))].slice(0, ROWS_MAX) : devices;
  byId("devices").replaceChildren(...shown.map(rowOf));
  byId("more").hidden = shown.length === devices.length;
  byId("more").textContent = (devices.length - shown.length) + " more devices, of which no row is shown";
}

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function chart(title, names, lines, fromZero) {
  const points = lines.flat(), figure = make("figure"), head = make("h2", title);
  if (names.length) head.append(": ", make("span", names[0], "busy"), ", ", make("span", names[1], "warn"));
  figure.append(head);
  const w = 320, h = 110, left = 44, right = 8, top = 8, bottom = 16;
  const svg = drawn("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": title });
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1), low = Math.min(...ys, ...(fromZero ? [0] : [])), high = Math.max(...ys);
  const y0 = high > low ? low : low - 0.5, y1 = high > low ? high : high + 0.5;
  const x = (v) => left + ((v - x0) / (x1 - x0)) * (w - left - right);
  const y = (v) => h - bottom - ((v - y0) / (y1 - y0)) * (h - top - bottom);
  svg.append(
    drawn("line", { class: "axis", x1: left, x2: left, y1: top, y2: h - bottom }),
    drawn("line", { class: "axis", x1: left, x2: w - right, y1: h - bottom, y2: h - bottom }),
    drawn("text", { x: left - 4, y: top + 6, "text-anchor": "end" }, y1.toPrecision(3)),
    drawn("text", { x: left - 4, y: h - bottom, "text-anchor": "end" }, y0.toPrecision(3)),
    drawn("text", { x: left, y: h - 3 }, "round " + x0),
    drawn("text", { x: w - right, y: h - 3, "text-anchor": "end" }, String(x1)));
  lines.forEach((line, i) => {
    const kind = i ? "second" : "";
    if (line.length) svg.append(drawn("polyline", { class: kind, points: line.map((p) => x(p[0]) + "," + y(p[1])).join(" ") }));
    if (line.length && line.length < 40) for (const p of line) svg.append(drawn("circle", { class: kind, cx: x(p[0]), cy: y(p[1]), r: 2 }));
  });
  figure.append(svg);
  return figure;
}

function showCharts(rounds) {
  const of = (name) => rounds.filter((r) => name in r.measured).map((r) => [r.round, r.measured[name]]);
  const past = rounds.filter((r) => r.round);
  const wanted = [
    ["loss", ["evaluated", "in training"], [of("loss"), of("train_loss")], false],
    ["accuracy", [], [of("accuracy")], true],
    ["exact match", [], [of("exact_match")], true],
    ["R2", [], [of("r2")], true],
    ["perplexity", [], [of("perplexity")], false],
    ["MB a round", ["up", "down"], [past.map((r) => [r.round, r.mb_up]), past.map((r) => [r.round, r.mb_down])], true],
    ["seconds a round", [], [past.map((r) => [r.round, r.seconds])], true],
    ["epsilon spent", [], [of("epsilon")], true],
  ];
  const has = wanted.filter(([, , lines]) => lines.some((line) => line.length));
  byId("charts").replaceChildren(...has.map((one) => chart(...one)));
}

let charted = "";
async function look() {
  try {
    const answer = await fetch("state.json?token=" + encodeURIComponent(query.get("token") || ""), { cache: "no-store" });
    if (!answer.ok) throw new Error("the watch says " + answer.status);
    const fleet = await answer.json();
    showJob(fleet.job);
    showCounts(fleet.counts);
    showDevices(fleet.devices);
    const key = JSON.stringify(fleet.rounds);
    if (key !== charted) showCharts(fleet.rounds);
    charted = key;
    byId("trouble").hidden = true;
  } catch (error) {
    byId("trouble").textContent = "no news: " + error.message + "; is `fleetune watch` still running?";
    byId("trouble").hidden = false;
  }
  if (!document.hidden) setTimeout(look, EVERY_MS);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
const root = document.documentElement;
if (["light", "dark"].includes(query.get("theme"))) root.dataset.theme = query.get("theme");
byId("theme").addEventListener("click", () => {
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
look();
