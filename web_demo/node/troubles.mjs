/**
 * `node troubles.mjs OPTIONS.json`: what the page says in Chromium when something is wrong, one line of JSON with a row for each case.
 * Options: profile (folder), cases: {name, url, does (one of DOES), hostRules?, prefs?, join?, file?, blocks?, quota?}, chromium?
 */
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { chromium } from "playwright-core";

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const PATIENCE_MS = 120000;
const options = JSON.parse(await readFile(process.argv[2], "utf8")), rows = {};
const LINES = "text,label\ncat,a\nhen,b\ndog,a\nsaw,c\n";

/** What each case does on an opened page. */
const DOES = {
  open: async () => {},
  join: (page, given) => joined(page, given),
  async twice(page, given, browser) {
    await joined(page, given, false);
    await page.waitForFunction(() => /waiting for the aggregator/.test(document.getElementById("state").textContent));
    const second = await visited(browser, given);
    await joined(second, given);
    return second;
  },
  async file(page, { file }) {
    await page.locator("#file").setInputFiles(file);
    await troubled(page);
  },
  async text(page, { text }) {
    await page.getByLabel("Lines, as they are read").fill(text);
    await page.getByLabel("Lines, as they are read").blur();
    await troubled(page);
  },
  async long(page) {
    await page.evaluate((lines) => {
      document.getElementById("lines").value = lines;
      document.getElementById("lines").dispatchEvent(new Event("change"));
    }, `text,label\n${`cat${" ".repeat(10000)}dog,a\n`.repeat(600)}`); // a browser does not count less than some megabytes
    await troubled(page);
  },
  async train(page) {
    await page.getByLabel("Lines, as they are read").fill(LINES + LINES.replace("text,label\n", "").repeat(5));
    await page.getByRole("button", { name: "Train here alone" }).click();
    await troubled(page);
  },
};

const troubled = (page) => page.waitForFunction(() => !document.getElementById("trouble").hidden);

async function joined(page, { join: given }, waits = true) {
  await page.getByLabel("Lines, as they are read").fill(LINES);
  for (const [id, value] of Object.entries(given)) await page.locator(`#${id}`).fill(value);
  await page.getByRole("button", { name: "Join the job" }).click();
  if (waits) await troubled(page);
}

async function visited(browser, { url, quota, blocks = [] }) {
  const page = await browser.newPage();
  page.setDefaultTimeout(PATIENCE_MS);
  // Before the page is there: what room is left is looked at now and then alone.
  if (quota) await (await browser.newCDPSession(page)).send("Storage.overrideQuotaForOrigin", { origin: new URL(url).origin, quotaSize: quota });
  for (const path of blocks) await page.route(`**/${path}`, (route) => route.abort());
  await page.goto(url);
  await page.waitForFunction(() => !document.getElementById("main").hidden || !document.getElementById("trouble").hidden);
  return page;
}

for (const [number, given] of options.cases.entries()) {
  const profile = join(options.profile, String(number));
  await mkdir(join(profile, "Default"), { recursive: true });
  if (given.prefs) await writeFile(join(profile, "Default", "Preferences"), JSON.stringify(given.prefs));
  const args = [...FLAGS, ...(given.hostRules ? [`--host-resolver-rules=${given.hostRules}`] : [])];
  const browser = await chromium.launchPersistentContext(profile, { executablePath: options.chromium ?? "/usr/bin/chromium", args });
  const row = (rows[given.name] = {});
  try {
    const page = await visited(browser, given), last = (await DOES[given.does](page, given, browser)) ?? page;
    row.trouble = await last.locator("#trouble").textContent();
    row.isShown = await last.locator("#trouble").isVisible();
    row.heading = await last.getByRole("heading", { name: "Train on this device" }).isVisible();
    row.model = await last.locator("#model").textContent();
    row.facts = await last.locator("#facts").textContent();
  } catch (error) {
    row.failed = String(error);
  }
  await browser.close();
}
console.log(JSON.stringify(rows));
