/** Rows of data files and pasted text: JSON lines, JSON arrays, CSV and TSV with a header. */
import { DataError, oneLine } from "./errors.mjs";

/** @typedef {{where: string, row: Record<string, unknown>}} Found */

/**
 * @param {string} content
 * @param {string} name of the file; its ending says the format, and without a known one the content does
 * @returns {Found[]}
 */
export function readRows(content, name) {
  const text = content.replace(/^\ufeff/, "");
  const ending = /\.(jsonl|ndjson|json|csv|tsv)$/i.exec(name)?.[1].toLowerCase();
  const found = (FORMATS[ending] ?? guessed(text))(text, name);
  if (!found.length) throw new DataError(`${name}: no data line in the file`);
  return found;
}

const FORMATS = { jsonl: jsonLines, ndjson: jsonLines, json: jsonAny, csv: (t, n) => cells(t, n, ","), tsv: (t, n) => cells(t, n, "\t") };

function guessed(text) {
  const start = text.trimStart()[0];
  if (start === "{") return jsonLines;
  if (start === "[") return jsonAny;
  return text.split("\n", 1)[0].includes("\t") ? FORMATS.tsv : FORMATS.csv;
}

function jsonAny(text, name) {
  if (!text.trimStart().startsWith("[")) return jsonLines(text, name);
  return parsed(text, name).map((row, i) => checked(row, `${name}, item ${i + 1}`));
}

function jsonLines(text, name) {
  const found = [];
  text.split(/\r\n|\n|\r/).forEach((line, i) => {
    const where = `${name}, line ${i + 1}`;
    if (line.trim().startsWith("["))
      throw new DataError(`${where}: a JSON array; expected an object on each line, or a file named .json`);
    if (line.trim()) found.push(checked(parsed(line, where), where));
  });
  return found;
}

function parsed(text, where) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new DataError(`${where}: not a JSON object: ${oneLine(error.message)}`);
  }
}

function checked(row, where) {
  if (row === null || typeof row !== "object" || Array.isArray(row)) throw new DataError(`${where}: not a JSON object`);
  return { where, row };
}

function cells(text, name, delimiter) {
  const rows = split(text, delimiter, name).filter(({ row }) => row.some((cell) => cell.trim()));
  const header = rows.shift()?.row.map((cell) => cell.trim()) ?? [];
  return rows.map(({ row, line }) => {
    const where = `${name}, line ${line}`;
    if (row.length !== header.length) throw new DataError(`${where}: ${row.length} columns, the header has ${header.length}: ${oneLine(header.join(", "))}`);
    return { where, row: Object.fromEntries(header.map((column, i) => [column, row[i]])) };
  });
}

/** RFC 4180: quotes where a cell holds the delimiter, a quote or an end of line. */
function split(text, delimiter, name) {
  const rows = [];
  let row = [], cell = "", quoted = false, line = 1, begun = 1;
  const endCell = () => (row.push(cell), (cell = ""));
  const endRow = () => (endCell(), rows.push({ row, line: begun }), (row = []), (begun = line));
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (c === "\n") line++;
    if (quoted) {
      if (c !== '"') cell += c;
      else if (text[i + 1] === '"') (cell += c), i++;
      else quoted = false;
    } else if (c === '"' && !cell) quoted = true;
    else if (c === delimiter) endCell();
    else if (c === "\n" || c === "\r") {
      if (c === "\r" && text[i + 1] === "\n") i++, line++;
      endRow();
    } else cell += c;
  }
  if (quoted) throw new DataError(`${name}, line ${begun}: not CSV: a quote that does not end`);
  if (cell || row.length) endRow();
  return rows;
}
