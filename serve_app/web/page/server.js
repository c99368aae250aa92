/* Requests to the server that this page came from. */

let key = null;

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(text) {
  key = text;
}

/* The answer to a POST of `body`, or to a GET without one, and how long it took.

   Returns { answer, tookMs, rankerMs }, rankerMs null where the server does not say. */
export async function ask(path, body) {
  const headers = {};
  if (key !== null) {
    headers.Authorization = `Bearer ${key}`;
  }
  const options = { headers };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    options.method = "POST";
    options.body = JSON.stringify(body);
  }

  const started = performance.now();
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ServerError("The server does not answer.", 0);
  }
  const text = await response.text();
  const tookMs = performance.now() - started;

  if (!response.ok) {
    throw new ServerError(reason(response.status, text), response.status);
  }
  const answer = JSON.parse(text);
  return { answer, tookMs, rankerMs: duration(response.headers.get("Server-Timing")) };
}

/* What was wrong, in the server's words: one line for each field. */
function reason(status, text) {
  let detail;
  try {
    detail = JSON.parse(text).detail;
  } catch {
    return `The server answered ${status}.`;
  }
  if (!Array.isArray(detail)) {
    return `The server answered ${status}: ${detail}.`;
  }
  const lines = detail.map((one) => `${one.loc.slice(1).join(".")}: ${one.msg} (${one.input})`);
  return `The server answered ${status}. ${lines.join("; ")}`;
}

/* 4.25 of "ranker;dur=4.25" */
function duration(header) {
  const found = /dur=([0-9.]+)/.exec(header ?? "");
  return found === null ? null : Number(found[1]);
}
