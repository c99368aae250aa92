/* All that the page remembers, and the moment that it is at. */

import { ask } from "./server.js";

export const state = {
  model: null, // GET /v1/model
  start: null, // POST /page/start
  openedAt: 0,
  who: null, // { userId } or { history: [{ item_id, actions }] }
  rows: [], // the newest events, the oldest first
  numEvents: 0,
  moments: [],
  moment: 0, // place in moments; behind the last one: the present
  candidates: [],
  kind: "rank", // or "recommend"
  facts: new Map(), // item id -> what is known of it
  posted: new Map(), // item id -> the event that was posted of it
  turn: 0, // counts questions, so that late answers are left out
  lists: [], // of the champion, and of a canary
  acts: [], // what can be done with a row
};

/* The time of a request now, in ms: behind everything that the user has done. */
export function present() {
  const clock = state.start.clock_ms + performance.now() - state.openedAt;
  const newest = state.rows.reduce((latest, row) => Math.max(latest, row.event_time ?? 0), 0);
  return Math.round(Math.max(clock, state.who.history === undefined ? newest + 1000 : 0));
}

export function isPresent() {
  return state.moment >= state.moments.length;
}

/* Place of the first row that has not happened yet. */
export function future() {
  return isPresent() ? state.rows.length : state.moments[state.moment].place;
}

export function momentTime() {
  return isPresent() ? present() : state.moments[state.moment].time;
}

/* Titles and popularity of items that were not met before. */
export async function learn(ids) {
  const missing = [...new Set(ids)].filter((id) => !state.facts.has(id));
  if (missing.length > 0) {
    const { answer } = await ask("page/items", { item_ids: missing });
    answer.forEach((fact) => state.facts.set(fact.item_id, fact));
  }
}

export function nameOf(id) {
  return state.facts.get(id)?.title ?? `Item ${id}`;
}
