// Calls to the HTTP API as the signed-in person: the session's cookie, and its CSRF token where something changes.

import { advice } from "./words.js";

/** A refusal: `code` and `detail` of the problem, and in `advice` what to do next. */
export class Refused extends Error {
  constructor(code, detail, status) {
    super(detail);
    this.code = code;
    this.status = status;
    this.advice = advice(code);
  }
}

const csrfToken = document.querySelector("meta[name=csrf-token]")?.content ?? "";

/** The answer's JSON, or null where it has none. Throws Refused, with code `unreachable` where nothing answered. */
export async function call(method, path, { body, headers } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      body,
      headers: { Accept: "application/json", ...(method === "GET" ? {} : { "X-CSRF-Token": csrfToken }), ...headers },
    });
  } catch {
    throw new Refused("unreachable", "The service does not answer.", 0);
  }
  const told = await response.json().catch(() => null);
  if (response.ok) return told;
  throw new Refused(told?.code ?? "internal", told?.detail ?? `The service answered ${response.status}.`, response.status);
}

/** A key that makes handing in twice harmless. (crypto.randomUUID is missing on pages served without TLS.) */
export function idempotencyKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
