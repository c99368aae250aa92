/* The newest events of a user, the newest first. */

import { counted, make, spoken, timeText } from "./dom.js";

/* Positions of the slider: before each of the user's times, then the present.

   times 3 3 5     moments  [{ time: 3, place: 0 }, { time: 5, place: 2 }] */
export function findMoments(rows) {
  const moments = [];
  rows.forEach((row, place) => {
    const last = moments.at(-1);
    if (row.event_time !== null && (last === undefined || last.time !== row.event_time)) {
      moments.push({ time: row.event_time, place });
    }
  });
  return moments;
}

export function showTimeline(node, note, rows, facts, { numEvents, future }) {
  const shown = rows.map((row, place) => timelineRow(row, facts.get(row.item_id), place >= future));
  node.replaceChildren(...shown.reverse());

  if (rows.length === 0) {
    note.textContent = "Nothing is known of them.";
  } else if (rows.length < numEvents) {
    note.textContent = `The newest ${rows.length} of ${counted(numEvents, "event")}.`;
  } else {
    note.textContent = `${counted(numEvents, "event")}.`;
  }
}

function timelineRow(row, fact, isLater) {
  const did = Object.keys(row.actions).filter((name) => row.actions[name]);
  const marks = did.map((name) => make("span", { class: "mark done" }, spoken(name)));
  if (marks.length === 0) {
    const isKnown = Object.keys(row.actions).length > 0;
    marks.push(make("span", { class: "mark" }, isKnown ? "passed over" : "shown"));
  }
  if (row.watch_ms > 0) {
    marks.push(make("span", { class: "mark" }, `${(row.watch_ms / 1000).toFixed(1)} s`));
  }
  if (isLater) {
    marks.push(make("span", { class: "mark" }, "later"));
  }

  const when = row.event_time === null ? "earlier" : timeText(row.event_time);
  return make(
    "li",
    { class: isLater ? "later" : null },
    make("span", { class: "title" }, fact?.title ?? `Item ${row.item_id}`),
    make("span", { class: "quiet" }, when),
    make("span", { class: "marks" }, ...marks),
  );
}
