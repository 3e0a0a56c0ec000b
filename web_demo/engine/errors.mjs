/** Errors by who must act, as the Python packages have them. Each message is one sentence: what, where, expected, got. */

/** Anything of ours: its message is meant for people. */
export class FleetuneError extends Error {
  constructor(message) {
    super(message);
    this.name = new.target.name;
  }
}
/** The artifact is damaged or of another kind: export or copy it again. */
export class ArtifactError extends FleetuneError {}
/** What is asked for cannot be: change the configuration. */
export class ConfigError extends FleetuneError {}
/** The data does not say what it should. */
export class DataError extends FleetuneError {}
/** A message or payload is bad: it is dropped. */
export class WireError extends FleetuneError {}
/** The server cannot be reached or refuses: try again. */
export class TransportError extends FleetuneError {}
/** What is kept on this device cannot be read or written. */
export class StateError extends FleetuneError {}

/**
 * A list for a message, cut to a few entries.
 * @param {string[]} names
 * @param {number} [most]
 */
export function some(names, most = 8) {
  const more = names.length - most;
  return names.slice(0, most).join(", ") + (more > 0 ? ` and ${more} more` : "");
}

/** Printable, on one line, at most `most` characters. */
export function oneLine(text, most = 300) {
  const shown = String(text).replace(/[^\x20-\x7e\u00a0-\uffff]+/g, "?");
  return shown.length > most ? `${shown.slice(0, most - 1)}…` : shown;
}
