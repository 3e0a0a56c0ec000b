/** PEM: blocks of base64 between lines that say of what; RFC 7468. */

/** The blocks of a text in their order; `der` is null where the base64 is damaged. @returns {{kind: string, der: Uint8Array|null}[]} */
export const pemBlocks = (text) => [...text.matchAll(/-----BEGIN ([A-Z0-9 ]+)-----([\s\S]*?)-----END \1-----/g)].map(([, kind, body]) => ({ kind, der: bytesOf(body) }));

function bytesOf(body) {
  try {
    return Uint8Array.from(atob(body.replace(/\s+/g, "")), (char) => char.charCodeAt(0));
  } catch {
    return null;
  }
}
