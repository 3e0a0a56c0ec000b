/** Texts to token ids with the artifact's tokenizer, and a data set of them; as Python's `data/text` and `data/loading`. */
import { Tokenizer } from "@huggingface/tokenizers";
import { Dataset } from "./dataset.mjs";
import { ArtifactError, ConfigError, DataError, oneLine } from "./errors.mjs";
import { classReader } from "./labels.mjs";
import { readRows } from "./lines.mjs";
import { features, labelIndex } from "./manifest.mjs";

const IGNORED = -100;
const TASKS = { "sequence-classification": 1, "causal-lm": 2 };

export class TextReader {
  /** @param {import("./artifact.mjs").Artifact} artifact */
  constructor(artifact) {
    const { manifest } = artifact, { tokenizer } = manifest;
    if (!tokenizer || !TASKS[manifest.task])
      throw new DataError(`task ${JSON.stringify(manifest.task)}${tokenizer ? "" : ", an artifact without a tokenizer,"}: a page reads text for ${Object.keys(TASKS).join(" and ")} alone`);
    this.manifest = manifest;
    try {
      const file = JSON.parse(new TextDecoder().decode(artifact.file(tokenizer.file)));
      this.tokenizer = new Tokenizer({ ...file, pre_tokenizer: wordwise(file.pre_tokenizer), truncation: null, padding: null }, {});
      this.unknown = file.model?.vocab?.[file.model.unk_token];
    } catch (error) {
      throw new ArtifactError(`${tokenizer.file}: cannot be read as a tokenizer: ${oneLine(error.message)}`);
    }
  }

  /**
   * A data file, or pasted text, as a labelled data set.
   * @param {string} content
   * @param {string} name of the file
   * @param {number} seqLen
   */
  labelled(content, name, seqLen) {
    const rows = readRows(content, name), read = classReader(this.manifest.labels), isClassed = this.manifest.task === "sequence-classification";
    const records = rows.map(({ where, row }) => {
      if (typeof row.text !== "string") throw new DataError(`${where}: no text; expected a column "text"`);
      return { where, text: row.text, pair: typeof row.text_b === "string" ? row.text_b : "", label: isClassed ? read(row.label, where) : 0 };
    });
    return this.#dataset(records, seqLen, true);
  }

  /** Texts without labels, in their order. @param {string[]} texts */
  plain(texts, seqLen) {
    return this.#dataset(texts.map((text, i) => ({ where: `text ${i + 1}`, text, pair: "" })), seqLen, false);
  }

  #dataset(records, seqLen, isLabelled) {
    const { manifest } = this, most = lengthMax(manifest) || seqLen, length = Math.min(seqLen, most);
    const encoded = records.map((record) => this.#encode(record, length));
    const columns = {}, made = { input_ids: (e) => e.ids, attention_mask: (e) => e.ids.map(() => 1), token_type_ids: (e) => e.types };
    for (const row of features(manifest)) {
      if (!made[row.name]) throw new DataError(`the model takes ${row.name}, which text does not give`);
      columns[row.name] = { rows: encoded.map(made[row.name]), pad: row.pad, dtype: row.dtype };
      if (row.below) this.#checkIds(columns[row.name].rows, row, records);
    }
    const labelName = isLabelled ? manifest.inputs[labelIndex(manifest)].name : "";
    if (isLabelled && manifest.task === "causal-lm") columns[labelName] = { rows: encoded.map((e) => e.ids), pad: IGNORED, dtype: "int64" };
    else if (isLabelled) columns[labelName] = { values: records.map((record) => record.label) };
    return new Dataset(columns, encoded.map((e) => e.ids.length), { seqLen, widthMax: length, labelName, cut: encoded.filter((e) => e.isCut).length });
  }

  #encode({ where, text, pair }, length) {
    if (!text.trim()) throw new DataError(`${where}: the text is empty`);
    let found;
    try {
      found = this.tokenizer.encode(text, pair ? { text_pair: pair } : {});
    } catch (error) {
      throw new DataError(`${where}: text that the tokenizer cannot take: ${oneLine(error.message)}`);
    }
    // The library has no id for an unknown word whose token is in the vocabulary alone.
    const ids = found.ids.map((id) => id ?? this.unknown), types = found.token_type_ids ?? ids.map(() => 0);
    if (ids.some((id) => !Number.isInteger(id))) throw new DataError(`${where}: a word that the tokenizer does not know`);
    const own = { ids, types, isCut: false };
    const got = own.ids.length > length ? this.#cut(own, { text, pair }, length, where) : own;
    if (got.ids.length < TASKS[this.manifest.task]) throw new DataError(`${where}: ${got.ids.length} tokens, expected at least ${TASKS[this.manifest.task]}`);
    return got;
  }

  /** Special tokens at the ends stay; the text between them loses tokens at the side that the manifest says. */
  #cut({ ids, types }, { text, pair }, length, where) {
    if (pair) throw new DataError(`${where}: a pair of texts of ${ids.length} tokens; the page takes pairs of up to ${length} and cuts none`);
    const bare = this.tokenizer.encode(text, { add_special_tokens: false }).ids.map((id) => id ?? this.unknown), first = startOf(ids, bare), special = ids.length - bare.length;
    if (length <= special) throw new ConfigError(`sequence length ${length} leaves no room for text beside ${special} special tokens`);
    const room = length - special, start = this.manifest.tokenizer.truncation_side === "left" ? bare.length - room : 0;
    const cut = (all, inside) => [...all.slice(0, first), ...inside, ...all.slice(first + bare.length)];
    const inner = types.slice(first, first + bare.length);
    return { ids: cut(ids, bare.slice(start, start + room)), types: cut(types, inner.slice(start, start + room)), isCut: true };
  }

  #checkIds(rows, { name, below }, records) {
    rows.forEach((row, i) => {
      const wrong = row.find((id) => id >= below);
      if (wrong !== undefined) throw new DataError(`${records[i].where}: ${name} ${wrong}, the model knows 0 to ${below - 1}`);
    });
  }
}

const WORD = String.raw`\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}`;
const WORDS = { type: "Split", pattern: { Regex: `[${WORD}]+|[^${WORD}\\p{White_Space}]+` }, behavior: "Removed", invert: true };

/** `Whitespace` with the letters of every script: the library's own, and JavaScript's \w, know ASCII alone. */
function wordwise(given) {
  if (given?.type === "Whitespace") return WORDS;
  return given?.type === "Sequence" ? { ...given, pretokenizers: given.pretokenizers.map(wordwise) } : given;
}

/** Where a text's own tokens begin among those with special ones. */
function startOf(ids, bare) {
  for (let first = 0; first <= ids.length - bare.length; first++) if (bare.every((id, i) => ids[first + i] === id)) return first;
  return 0;
}

/** The most tokens that tokenizer and model take; 0 where neither says. */
function lengthMax({ tokenizer, bounds }) {
  const known = [tokenizer?.max_length, bounds.seq].filter(Boolean);
  return known.length ? Math.min(...known) : 0;
}
