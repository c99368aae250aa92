/* Why a row is where it is: from what the page knows, and from what the server says of its score. */

import { counted, percent, spoken } from "./dom.js";
import { guarded, sentence } from "./news.js";
import { ask } from "./server.js";
import { future, isPresent, learn, momentTime, nameOf, state } from "./state.js";

const LEAST_CHANGE = 0.0001; // of a probability, to be worth a line
const MOST_EFFECTS = 3; // lines about the history
const SOURCES = { model: "near to this history", followed: "of a followed author", popular: "popular" };

export function marksOf(row) {
  const marks = [];
  const fact = state.facts.get(row.id);
  const next = isPresent() ? undefined : state.rows.find((one, place) => place >= future() && one.event_time === momentTime() && one.item_id === row.id);
  if (next !== undefined) {
    marks.push({ kind: "done", text: `shown next: ${deeds(next.actions)}` });
  }
  if (fact?.num_shown > 0) {
    const share = fact.percentile >= 50 ? `top ${upTo(100 - fact.percentile)}` : `last ${upTo(fact.percentile)}`;
    marks.push({ text: `popularity: ${share} %` });
  } else {
    marks.push({ text: "not shown in training" });
  }
  if (fact?.is_known === false) {
    marks.push({ kind: "odd", text: "unknown to the model" });
  }
  return marks;
}

function upTo(share) {
  return Math.max(1, Math.ceil(share));
}

export function reasons(row) {
  const fact = state.facts.get(row.id);
  const found = [];
  if (fact?.num_shown > 0) {
    const share = Math.floor(10 * fact.percentile) / 10;
    found.push(`Shown ${counted(fact.num_shown, "time")} in training: more often than ${share} % of the items.`);
  }
  if (fact?.is_known === false) {
    found.push("Scored from the row that all unknown items share.");
  }

  const seen = state.rows.slice(0, future()).filter((one) => one.item_id === row.id);
  if (seen.length > 0) {
    found.push(`In this history ${counted(seen.length, "time")}, the last time: ${deeds(seen.at(-1).actions)}.`);
  }
  if (row.found) {
    found.push(`Found as: ${row.found.sources.map((source) => SOURCES[source]).join(", ")}.`);
    if (row.found.like.length > 0) {
      const likes = row.found.like.map((like) => `${nameOf(like.item_id)} (${like.cosine.toFixed(2)})`);
      found.push(`Nearest in the history: ${likes.join(", ")}.`);
    }
  }
  return found;
}

/* What the server says of one row's score: the history rows that move it most, and the rates that
   the model reads. It costs a few passes, so it is asked for one row at a time. */
export async function explain(list, row) {
  const body = { ...list.body, candidates: [{ item_id: row.id }], explain: true };
  const got = await guarded(() => ask("v1/rank", body));
  if (got === undefined) {
    return [];
  }

  const { explanation, ordered_by: task } = got.answer;
  const [reason] = explanation.candidates;
  const effects = reason.history.filter((effect) => Math.abs(effect.change) >= LEAST_CHANGE);
  await learn(effects.flatMap((effect) => (effect.item_id === null ? [] : [effect.item_id])));
  const found = effects.slice(0, MOST_EFFECTS).map((effect) => effectText(effect, task));

  const rates = Object.entries(reason.rates).filter(([, rate]) => rate.rows > 0);
  if (rates.length > 0) {
    const texts = rates.map(([name, rate]) => `${spoken(name)} ${percent(rate.rates[task])} (${counted(rate.rows, "row")})`);
    found.push(`Rates of ${spoken(task)} that the model reads: ${texts.join(", ")}.`);
  }
  const unknown = reason.unknown.filter((name) => name !== "item_id");
  if (unknown.length > 0) {
    found.push(`Not seen in training: ${unknown.map((name) => spoken(name.replace(".", " "))).join(", ")}.`);
  }
  if (explanation.note) {
    found.push(`${sentence(explanation.note)}.`);
  }
  return found;
}

function effectText(effect, task) {
  const row = state.rows.find((one) => one.item_id === effect.item_id && one.event_time === effect.event_time);
  const what = effect.item_id === null ? "an item" : nameOf(effect.item_id);
  const did = row === undefined ? "" : ` (${deeds(row.actions)})`;
  const size = `${(100 * Math.abs(effect.change)).toFixed(2)} points of ${spoken(task)}`;
  return `${what}${did} in the history ${effect.change > 0 ? "adds" : "takes"} ${size}.`;
}

export function deeds(actions) {
  const did = Object.keys(actions).filter((name) => actions[name]);
  return did.length > 0 ? did.map(spoken).join(", ") : "passed over";
}
