/**
 * `node gpu.mjs OPTIONS.json`: the golden step of a page in Chromium with a software adapter of WebGPU, and what the page chooses there.
 * Options: url, profile (folder), chromium?. One line of JSON.
 */
import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const FLAGS = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const { url, profile, chromium: executablePath = "/usr/bin/chromium" } = JSON.parse(await readFile(process.argv[2], "utf8"));
const browser = await chromium.launchPersistentContext(profile, { executablePath, args: FLAGS }), page = await browser.newPage(), fetched = [];
page.setDefaultTimeout(500000);
page.on("request", (request) => fetched.push(new URL(request.url()).pathname));
await page.goto(url);
await page.waitForFunction(() => !document.getElementById("main").hidden || !document.getElementById("trouble").hidden);
const has = await page.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter()));
const before = [...fetched], found = has ? await page.evaluate(() => globalThis.selfcheck({ gpu: true })) : {};
console.log(JSON.stringify({ has, ...found, isFetchedBefore: before.some((path) => path.includes("webgpu")), trouble: await page.locator("#trouble").textContent() }));
await browser.close();
