/**
 * `node walk.mjs OPTIONS.json`: one walk through the page in Chromium, as a person takes it; one line of JSON with what was seen.
 * Options: url, lines (text), profile (folder), and perhaps text (to predict), steps, join ({job, name, certificate?, key?: files}), shots (folder), hostRules, onlyOpen, killIn (how what the
 * page says begins when Chromium is killed by SIGKILL, and started again), app (true: as in the Android app, and what the app was told).
 */
import { mkdir, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { chromium } from "playwright-core";

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const PATIENCE_MS = 240000;
const options = JSON.parse(await readFile(process.argv[2], "utf8")), seen = { troubles: [], kills: 0 };
const flags = [...FLAGS, ...(options.hostRules ? [`--host-resolver-rules=${options.hostRules}`] : [])];
let browser = await opened(), page = await visited();

/** A browser with the profile of the one before, as after a restart. */
function opened() {
  return chromium.launchPersistentContext(options.profile, { executablePath: options.chromium ?? "/usr/bin/chromium", args: flags, viewport: { width: 900, height: 1100 } });
}

async function visited() {
  const found = await browser.newPage();
  found.setDefaultTimeout(PATIENCE_MS);
  if (options.app) await found.addInitScript(() => {
    globalThis.told = [];
    const tell = (name) => (given) => void told.push([name, given]);
    globalThis.fleetuneApp = { training: tell("training"), whenCharging: tell("whenCharging"), isWhenCharging: () => true };
  });
  await found.addInitScript(() => {
    globalThis.said = [];
    addEventListener("DOMContentLoaded", () => {
      const line = document.getElementById("state");
      new MutationObserver(() => said.push(line.textContent)).observe(line, { childList: true, characterData: true, subtree: true });
    });
  });
  found.on("console", (message) => message.type() === "error" && seen.troubles.push(message.text()));
  found.on("pageerror", (error) => seen.troubles.push(String(error)));
  found.on("requestfailed", (request) => seen.troubles.push(`${request.url()}: ${request.failure()?.errorText}`));
  await found.goto(options.url);
  await found.waitForFunction(() => !document.getElementById("main").hidden || !document.getElementById("trouble").hidden);
  return found;
}

const text = (id) => page.locator(`#${id}`).textContent();
const shot = async (name, more = {}) => options.shots && (await mkdir(options.shots, { recursive: true }), page.screenshot({ path: join(options.shots, `${name}.png`), ...more }));

try {
  seen.model = await text("model");
  seen.facts = await text("facts");
  seen.trouble = await text("trouble");
  if (seen.trouble && options.onlyOpen) throw new Stop();
  seen.selfcheck = await page.evaluate(() => globalThis.selfcheck());
  seen.isolated = await page.evaluate(() => globalThis.crossOriginIsolated);
  if (options.onlyOpen) throw new Stop();
  await page.getByLabel("Lines, as they are read").fill(options.lines);
  await page.getByLabel("Or a text").fill("red green, blue");
  await page.getByLabel("of class").selectOption("a");
  await page.getByRole("button", { name: "Add" }).click();
  await page.waitForFunction(() => document.getElementById("counted").textContent.includes("texts"));
  seen.counted = await text("counted");
  await page.getByLabel("Steps", { exact: true }).fill(String(options.steps ?? 12));
  await page.getByLabel("Steps", { exact: true }).press("Enter"); // by the keyboard alone
  await page.waitForFunction(() => /^Done/.test(document.getElementById("state").textContent) || !document.getElementById("trouble").hidden);
  await page.waitForFunction(() => document.getElementById("accuracy-after").textContent !== "–" || !document.getElementById("trouble").hidden);
  for (const id of ["state", "loss", "trouble", "accuracy-before", "accuracy-after", "loss-before", "loss-after"]) seen[id] = await text(id);
  await page.getByLabel("A text", { exact: true }).fill(options.text ?? "cat dog");
  await page.getByRole("button", { name: "Predict" }).press("Enter");
  await page.waitForFunction(() => document.getElementById("answers").children.length > 0);
  seen.answers = await page.locator("#answers li").allTextContents();
  seen.leftBefore = await text("left-sum");
  if (options.join) await joined();
  await shot("desktop", { fullPage: true });
  await page.setViewportSize({ width: 390, height: 844 });
  await page.emulateMedia({ colorScheme: "dark" });
  seen.overflow = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
  await shot("phone-dark", { fullPage: true });
  seen.unnamed = await page.evaluate(() => [...document.querySelectorAll("input, select, textarea, button, progress")].filter((one) => !(one.labels?.length || one.textContent.trim() || one.ariaLabel)).map((one) => one.id));
  await page.getByRole("button", { name: "Delete everything kept here" }).click();
  await page.waitForFunction(() => document.getElementById("forgotten").textContent === "All deleted.");
  seen.leftAfter = await text("left-sum");
  if (options.app) seen.told = await page.evaluate(() => globalThis.told);
  await page.reload();
  await page.waitForFunction(() => !document.getElementById("main").hidden);
  seen.linesAfter = await page.getByLabel("Lines, as they are read").inputValue();
} catch (error) {
  if (!(error instanceof Stop)) {
    seen.failed = String(error);
    seen.state = await text("state").catch(() => "");
    await shot("failed", { fullPage: true }).catch(() => {});
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));

async function joined() {
  const isOver = () => /^Finished/.test(document.getElementById("state").textContent) || !document.getElementById("trouble").hidden;
  await page.getByLabel("Job", { exact: true }).fill(options.join.job);
  await page.getByLabel("Name of this device").fill(options.join.name);
  await page.getByLabel(/also with fewer/).check();
  if (options.join.certificate) {
    await page.getByText("Certificates, for a job under masks").press("Enter");
    await page.getByLabel("This device's own").setInputFiles(options.join.certificate);
    await page.getByLabel("Its private key").setInputFiles(options.join.key);
  }
  await page.getByRole("button", { name: "Join the job" }).click();
  for (const start of options.killIn ?? []) {
    const isThere = (begin) => said.some((line) => line.startsWith(begin)) || (said.some((line) => line.startsWith("Finished")) && "over");
    if ((await (await page.waitForFunction(isThere, start)).jsonValue()) === "over") break;
    await killed();
    seen.kills++;
    browser = await opened();
    page = await visited(); // it joins again by itself
  }
  await page.waitForFunction(isOver);
  seen.joined = await text("state");
  for (const id of ["trust", "authority"]) seen[id] = await page.locator(`#${id}`).inputValue();
  seen.trouble = await text("trouble");
  seen.leftJoined = await text("left-sum");
  seen.leftLines = await page.locator("#left tbody tr").allTextContents();
}

/** Kill the browser of this profile, and whatever it has started. */
async function killed() {
  const gone = new Promise((resolve) => browser.once("close", resolve));
  for (const pid of (await readdir("/proc")).filter((name) => /^[0-9]+$/.test(name))) {
    const command = await readFile(`/proc/${pid}/cmdline`, "utf8").catch(() => "");
    if (!command.includes(`--user-data-dir=${options.profile}`)) continue;
    try {
      process.kill(Number(pid), "SIGKILL");
    } catch (error) {
      if (error.code !== "ESRCH") throw error; // it died with its parent
    }
  }
  await gone;
}

function Stop() {}
