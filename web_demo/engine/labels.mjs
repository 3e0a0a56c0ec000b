/** A label, as a person or a spreadsheet writes it, to the index of its class: names first, for numbers too; as Python's. */
import { DataError, oneLine, some } from "./errors.mjs";

const NUMBER = /^[+-]?[0-9]+(\.[0-9]+)?$/;
const stripped = (text) => text.trim().replace(/^\ufeff+|\ufeff+$/g, "").trim();

/** @param {string[]} names @returns {(label: unknown, where: string) => number} DataError for none, or one that may mean two */
export function classReader(names) {
  const places = new Map(names.map((name, i) => [name, i]).reverse()), numbers = new Map();
  names.forEach((name, i) => {
    const plain = stripped(name);
    if (NUMBER.test(plain)) numbers.set(normal(plain), [...(numbers.get(normal(plain)) ?? []), i]);
  });
  return (label, where) => {
    if (!["string", "number", "boolean"].includes(typeof label)) throw new DataError(`${where}: no label; expected a name or a number`);
    const written = String(label), plain = stripped(written);
    for (const name of [written, plain]) if (places.has(name)) return places.get(name);
    if (/^(true|false)$/i.test(plain)) {
      const alike = names.flatMap((name, i) => (stripped(name).toLowerCase() === plain.toLowerCase() ? [i] : []));
      if (alike.length === 1) return alike[0];
    } else if (NUMBER.test(plain)) return ofNumber(plain, numbers, names, where);
    throw new DataError(`${where}: no label ${oneLine(JSON.stringify(label), 80)}; have: ${some(names, 10)}`);
  };
}

function ofNumber(plain, numbers, names, where) {
  if (numbers.size) {
    const found = numbers.get(normal(plain)) ?? [];
    if (found.length === 1) return found[0];
    const said = found.length ? `may be any of ${some(found.map((i) => names[i]))}` : `is no class; numbers are names here; have: ${some(names, 10)}`;
    throw new DataError(`${where}: label ${oneLine(plain, 40)} ${said}`);
  }
  const number = Number(plain);
  if (!(number >= 0 && number < names.length)) throw new DataError(`${where}: label ${oneLine(plain, 40)} out of range; expected 0 to ${names.length - 1}`);
  if (!Number.isInteger(number)) throw new DataError(`${where}: label ${oneLine(plain, 40)} is no whole number`);
  return number;
}

/** One spelling for each decimal number. */
function normal(plain) {
  const [, sign, whole, part = ""] = /^([+-]?)([0-9]+)(?:\.([0-9]+))?$/.exec(plain);
  const digits = whole.replace(/^0+(?=.)/, ""), rest = part.replace(/0+$/, "");
  return (sign === "-" && `${digits}${rest}` !== "0" ? "-" : "") + digits + (rest && `.${rest}`);
}
