/** Spreads over time what many devices have reason to do in the same moment; docs/draws.md, "Jitter". */
import { uniforms } from "../engine/draws.mjs";
import { sha256 } from "../engine/sha256.mjs";

export class Jitter {
  constructor(deviceId) {
    this.seed = sha256(new TextEncoder().encode(deviceId)).subarray(0, 6).reduce((number, byte) => number * 256 + byte, 0);
    this.count = 0;
  }

  /** A time from 0 to `seconds`. */
  within(seconds) {
    return seconds * uniforms([this.seed, "jitter", this.count++, 0], 1)[0];
  }

  /** A time from three quarters of `seconds` to all of them. */
  around = (seconds) => seconds - this.within(seconds / 4);
}
