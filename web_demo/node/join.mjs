/**
 * `node join.mjs OPTIONS.json`: a page in Chromium joins a job, and is left open for nobody: its browser ends. Without `join` its table is read.
 * Options: url, profile (folder), lines, join ({job, name}), chromium?. One line of JSON: state, left (rows of what left the device), trouble.
 */
import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const { url, profile, lines, join, chromium: executablePath = "/usr/bin/chromium" } = JSON.parse(await readFile(process.argv[2], "utf8"));
const browser = await chromium.launchPersistentContext(profile, { executablePath, args: FLAGS }), page = await browser.newPage();
page.setDefaultTimeout(240000);
await page.goto(url);
await page.waitForFunction(() => !document.getElementById("main").hidden || !document.getElementById("trouble").hidden);
if (join) {
  await page.getByLabel("Lines, as they are read").fill(lines);
  await page.getByLabel("Job", { exact: true }).fill(join.job);
  await page.getByLabel("Name of this device").fill(join.name);
  await page.getByLabel(/also with fewer/).check();
  await page.getByRole("button", { name: "Join the job" }).click();
  await page.waitForFunction(() => /aggregator|Round/.test(document.getElementById("state").textContent) || !document.getElementById("trouble").hidden);
} else { // where it was still in a job, it joins again, and hears that it is over
  const isOver = () => document.getElementById("left-sum").textContent !== "Nothing: 0 bytes." && /^(Nothing|Finished)/.test(document.getElementById("state").textContent);
  await page.waitForFunction(isOver);
}
const text = (id) => page.locator(`#${id}`).textContent();
console.log(JSON.stringify({ state: await text("state"), trouble: await text("trouble"), left: await page.locator("#left tbody tr").allTextContents() }));
await browser.close();
