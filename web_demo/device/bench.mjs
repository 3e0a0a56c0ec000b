/** What a device works with: an engine, and its data as text, tokenised for the length that is asked for. */
import { TextReader } from "../engine/text.mjs";

const FIRST_SEQ_LEN = 128;

export class Bench {
  /**
   * @param {import("../engine/engine.mjs").Engine} engine
   * @param {{content: string, name: string}} data
   * @param {() => Promise<unknown>} [pause] lets messages in between two batches
   */
  constructor(engine, data, pause = breathe) {
    [this.engine, this.data, this.pause] = [engine, data, pause];
    this.texts = new TextReader(engine.artifact);
    this.made = new Map();
    /** Lines of the data, whatever the length they are cut to. */
    this.numSamples = this.dataset(FIRST_SEQ_LEN).numSamples;
  }

  /** The labelled samples. @param {number} seqLen @returns {import("../engine/dataset.mjs").Dataset} */
  dataset(seqLen) {
    if (!this.made.has(seqLen)) this.made = new Map([[seqLen, this.texts.labelled(this.data.content, this.data.name, seqLen)]]);
    return this.made.get(seqLen);
  }
}

/** Let timers and sockets have their turn. */
export const breathe = () => new Promise((resolve) => setTimeout(resolve, 0));
