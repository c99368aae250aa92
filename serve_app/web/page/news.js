/* The line that says what happened. It is a live region: screen readers say it too. */

import { byId, counted, milliseconds } from "./dom.js";
import { ServerError } from "./server.js";
import { nameOf, state } from "./state.js";

export function tell(text, kind = "") {
  byId("news").className = kind;
  byId("news").textContent = text;
}

export function tellFirst({ numRows, tookMs, rankerMs, isLate }) {
  if (!isLate) {
    const whose = state.who.history === undefined ? `User ${state.who.userId}` : "Your history";
    tell(`${whose}: ${counted(numRows, "item")} ranked in ${milliseconds(tookMs)}${rankerText(rankerMs)}. Now ${labels()} one.`);
  }
}

/* What the buttons of a row say: click, like or skip */
function labels() {
  const words = state.acts.map((one) => one.label);
  return `${words.slice(0, -1).join(", ")} or ${words.at(-1)}`;
}

export function tellChange(one, id, from, to, { moved, numRows, tookMs, rankerMs, keptMs }) {
  let text = `${one.label}: ${nameOf(id)}. `;
  if (to === undefined) {
    text += "It has left the list. ";
  } else {
    text += from === to ? `It stays in place ${to}. ` : `It went from place ${from} to ${to}. `;
  }
  text += moved === 0 ? "Nothing else moved. " : `${moved} of ${numRows} changed places. `;
  if (keptMs !== null) {
    text += `Event kept in ${milliseconds(keptMs)}, `;
  }
  text += `ranked again in ${milliseconds(tookMs)}${rankerText(rankerMs)}.`;
  tell(sentence(text), "moved");
}

export function sentence(text) {
  return text[0].toUpperCase() + text.slice(1);
}

export function rankerText(rankerMs) {
  return rankerMs === null ? "" : ` (${milliseconds(rankerMs)} of it in the ranker)`;
}

/* Run `work`; what goes wrong is said on the page. */
export async function guarded(work) {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof ServerError)) {
      throw error;
    }
    tell(error.message, "error");
    return undefined;
  }
}
