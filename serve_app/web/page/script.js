/* The page: whose list, as of when, and what happens to it when they act.

   server.js asks, lists.js and timeline.js show, state below is all that is remembered. */

import { byId, counted, make, milliseconds, percent, spoken, timeText } from "./dom.js";
import { ItemList } from "./lists.js";
import { ask, ServerError, useKey } from "./server.js";
import { findMoments, showTimeline } from "./timeline.js";

const HEALTH_MS = 10_000;
const SETTLE_MS = 150; // a slider that moves is asked for when it rests
const MINUTE_MS = 60_000;
const LEAST_CHANGE = 0.0001; // of a probability, to be worth a line
const MOST_EFFECTS = 3; // lines about the history
const SOURCES = { model: "near to this history", followed: "of a followed author", popular: "popular" };

const state = {
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
};
let lists = []; // of the champion, and of a canary
let acts = []; // what can be done with a row

// To begin with ---------------------------------------------------------------

async function begin() {
  state.model = (await ask("v1/model")).answer;
  state.start = (await ask("page/start", {})).answer;
  state.openedAt = performance.now();
  state.candidates = state.start.candidates;
  acts = findActs(state.model);

  const roles = Object.keys(state.start.trial_keys); // champion, perhaps canary
  lists = roles.map((role) => {
    const list = new ItemList(role, acts, act, explain);
    list.role = role;
    return list;
  });
  byId("panel").replaceChildren(...lists.map((list) => list.element));
  byId("panel").classList.toggle("two", lists.length === 2);

  describeModel();
  fillControls();
  byId("main").hidden = false;
  showHealth();
  setInterval(showHealth, HEALTH_MS);

  if (state.start.users.length > 0) {
    await chooseUser(state.start.users[0].user_id);
  } else {
    tell("Whose list? Give a user's id, or type a history.");
    byId("user").focus();
  }
}

/* The first action of the model for a click, another for a like, and none of both. */
function findActs(model) {
  const names = [...model.tasks, ...model.actions.filter((name) => !model.tasks.includes(name))];
  const first = names.find((name) => name.includes("click")) ?? names[0];
  const others = names.filter((name) => name !== first);
  const second = others.find((name) => /(^|_)like/.test(name)) ?? others[0];
  const offered = [first, second].filter((name) => name !== undefined);

  const none = Object.fromEntries(offered.map((name) => [name, false]));
  const found = offered.map((name) => ({
    name,
    label: spoken(name),
    actions: (before) => ({ ...none, ...before, [name]: true }),
    isDone: (before) => before?.[name] === true,
  }));
  found.push({
    name: "skip",
    label: "skip",
    actions: (before) => before ?? none,
    isDone: (before) => before !== undefined && !Object.values(before).includes(true),
  });
  return found;
}

function describeModel() {
  const model = state.model;
  let text = `${model.model_name}, version ${model.model_version}`;
  if (model.canary_version !== null) {
    text += `; canary: version ${model.canary_version}`;
  }
  byId("model").textContent = text;
}

function fillControls() {
  const { model, start } = state;
  const examples = start.users.map((user) =>
    make(
      "button",
      { type: "button", class: "chip", "data-user": user.user_id, onclick: () => guarded(() => chooseUser(user.user_id)) },
      `${user.user_id}`,
      make("span", { class: "quiet" }, ` ${counted(user.num_events, "event")}`),
    ),
  );
  byId("examples").replaceChildren(...examples);

  byId("order").replaceChildren(...model.tasks.map((task) => make("option", { value: task }, spoken(task))));
  const inputs = model.request_features.map((name) =>
    make(
      "label",
      {},
      `${spoken(name)} `,
      make("input", { type: "number", min: "0", size: "4", "data-feature": name, placeholder: "any", onchange: () => guarded(replay) }),
    ),
  );
  byId("features").replaceChildren("sent along:", ...inputs);
  byId("features").hidden = inputs.length === 0;

  byId("items").value = state.candidates.join(" ");
  byId("rows").placeholder = [12, 7].map((item, i) => `${item}${i === 0 ? ` ${acts[0].label}` : ""}`).join("\n");
  byId("tab-recommend").hidden = model.index === null;
}

// Whose list ------------------------------------------------------------------

async function chooseUser(userId) {
  state.who = { userId };
  byId("user").value = userId;
  for (const chip of document.querySelectorAll("#examples .chip")) {
    chip.setAttribute("aria-pressed", String(chip.dataset.user === String(userId)));
  }
  byId("kept").hidden = false;
  await beginAnew();
}

async function chooseHistory(history) {
  state.who = { history };
  for (const chip of document.querySelectorAll("#examples .chip")) {
    chip.setAttribute("aria-pressed", "false");
  }
  byId("kept").hidden = true;
  await beginAnew();
}

async function beginAnew() {
  state.turn += 1; // what was asked for somebody else is too late now
  state.posted.clear();
  lists.forEach((list) => list.forget());
  const who = state.who;
  await readTimeline();
  if (who !== state.who) {
    return; // somebody else was chosen meanwhile
  }
  state.moment = state.moments.length;
  fillMoment();
  tellFirst(await refresh());
}

/* The user's newest events, of those that were posted just now too. */
async function readTimeline() {
  if (state.who.history !== undefined) {
    const now = present();
    state.rows = timed(state.who.history, now).map((row) => ({ ...row, watch_ms: null }));
    state.numEvents = state.rows.length;
    state.moments = [];
    return;
  }

  const who = state.who;
  const wasPresent = isPresent();
  const { answer } = await ask("page/user", { user_id: who.userId });
  if (who !== state.who) {
    return;
  }
  state.rows = answer.rows;
  state.numEvents = answer.num_events;
  state.moments = findMoments(answer.rows);
  if (wasPresent) {
    state.moment = state.moments.length;
  }
  answer.items.forEach((fact) => state.facts.set(fact.item_id, fact));
}

/* Rows of a typed history, a minute apart. */
function timed(history, now) {
  return history.map((row, i) => ({ ...row, event_time: now - (history.length - i) * MINUTE_MS, request_features: {} }));
}

/* One typed line: an item, and what was done with it. */
function readLine(line) {
  const [item, ...words] = line.trim().split(/\s+/);
  const actions = Object.fromEntries(acts.flatMap((one) => (one.name === "skip" ? [] : [[one.name, false]])));
  for (const word of words) {
    const name = state.model.actions.find((action) => action === word || spoken(action).replaceAll(" ", "_") === word);
    if (name === undefined) {
      const known = state.model.actions.map((action) => spoken(action).replaceAll(" ", "_"));
      throw new ServerError(`“${word}” is no action: ${known.join(", ")}.`, 0);
    }
    actions[name] = true;
  }
  return { item_id: readId(item, "item_id"), actions };
}

/* An id as the logs have it: text, or a number. */
function readId(text, column) {
  if (state.model.text_ids.includes(column)) {
    return text;
  }
  const number = Number(text);
  if (!/^\d+$/.test(text) || !Number.isSafeInteger(number)) {
    throw new ServerError(`“${text}” is no id: ${spoken(column)} is a number up to 2^53 here.`, 0);
  }
  return number;
}

// As of when ------------------------------------------------------------------

/* The time of a request now, in ms: behind everything that the user has done. */
function present() {
  const clock = state.start.clock_ms + performance.now() - state.openedAt;
  const newest = state.rows.reduce((latest, row) => Math.max(latest, row.event_time ?? 0), 0);
  return Math.round(Math.max(clock, state.who.history === undefined ? newest + 1000 : 0));
}

function isPresent() {
  return state.moment >= state.moments.length;
}

/* Place of the first row that has not happened yet. */
function future() {
  return isPresent() ? state.rows.length : state.moments[state.moment].place;
}

function momentTime() {
  return isPresent() ? present() : state.moments[state.moment].time;
}

/* The slider, what it says, and the request features of that moment. */
function fillMoment() {
  const slider = byId("moment");
  slider.max = state.moments.length;
  slider.value = state.moment;
  slider.disabled = state.moments.length === 0;
  sayMoment();

  const next = isPresent() ? state.rows.at(-1) : state.rows[future()];
  for (const input of document.querySelectorAll("[data-feature]")) {
    input.value = next?.request_features[input.dataset.feature] ?? "";
  }
}

function sayMoment() {
  let text = "now";
  if (!isPresent()) {
    text = `${timeText(momentTime())}, before event ${state.numEvents - state.rows.length + future() + 1} of ${state.numEvents}`;
  } else if (state.start.is_past && state.who?.history === undefined) {
    text = `now: ${timeText(momentTime())}, where the logs end`;
  }
  byId("moment-text").textContent = text;
  byId("moment").setAttribute("aria-valuetext", text);
}

// Asking for lists --------------------------------------------------------------

function requestBody(role) {
  const time = momentTime();
  const body = {
    request_time_ms: time,
    request_features: features(),
    order_by: byId("order").value,
    trial_key: state.start.trial_keys[role],
  };
  if (state.who.history === undefined) {
    body.user_id = state.who.userId;
  } else {
    body.history = timed(state.who.history, time).map(({ item_id, event_time, actions }) => ({ item_id, event_time, actions }));
  }
  return body;
}

function features() {
  const found = {};
  for (const input of document.querySelectorAll("[data-feature]")) {
    if (input.value !== "") {
      found[input.dataset.feature] = Number(input.value);
    }
  }
  return found;
}

/* What is ranked: at a past moment also what they were shown next. */
function itemsToRank() {
  const next = state.rows.filter((row) => !isPresent() && row.event_time === momentTime());
  return [...new Set([...next.map((row) => row.item_id), ...state.candidates])];
}

async function askList(list) {
  const body = requestBody(list.role);
  if (state.kind === "recommend") {
    const asked = { ...body, n: state.start.list_length, explain: true };
    const got = await ask("v1/recommend", asked);
    return { ...got, body, items: got.answer.items.map((item) => recommendedRow(item, got.answer)) };
  }

  const asked = { ...body, candidates: itemsToRank().map((item) => ({ item_id: item })) };
  const got = await ask("v1/rank", asked);
  return { ...got, body, items: got.answer.order.map((place) => rankedRow(place, got.answer)) };
}

function rankedRow(place, answer) {
  const scores = {};
  for (const [task, values] of Object.entries(answer.scores)) {
    scores[task] = values[place];
  }
  return { id: answer.item_ids[place], scores, orderedBy: answer.ordered_by, found: null };
}

function recommendedRow(item, answer) {
  const orderedBy = answer.ordered_by;
  const scores = { [orderedBy]: item.score, ...item.why?.scores };
  return { id: item.item_id, scores, orderedBy, found: item.why };
}

/* Ask for the lists and show them; how many rows of the first one moved, and how long it took. */
async function refresh() {
  const turn = ++state.turn;
  const answers = await Promise.all(lists.map(askList));
  const ids = answers.flatMap(({ items }) => items.flatMap((row) => [row.id, ...relatives(row)]));
  await learn(ids);
  if (turn !== state.turn) {
    return { moved: 0, isLate: true };
  }

  const moved = answers.map((got, i) => showList(lists[i], got));
  showTimeline(byId("timeline"), byId("timeline-text"), state.rows, state.facts, { numEvents: state.numEvents, future: future() });
  sayMoment();
  return { moved: moved[0], numRows: answers[0].items.length, tookMs: answers[0].tookMs, rankerMs: answers[0].rankerMs };
}

function relatives(row) {
  return (row.found?.like ?? []).map((like) => like.item_id);
}

/* Titles and popularity of items that were not met before. */
async function learn(ids) {
  const missing = [...new Set(ids)].filter((id) => !state.facts.has(id));
  if (missing.length > 0) {
    const { answer } = await ask("page/items", { item_ids: missing });
    answer.forEach((fact) => state.facts.set(fact.item_id, fact));
  }
}

function showList(list, got) {
  list.body = got.body;
  list.requestId = state.kind === "rank" ? got.answer.request_id : null;
  const rows = got.items.map((row) => ({
    ...row,
    fact: state.facts.get(row.id),
    marks: marksOf(row),
    why: reasons(row),
    done: state.posted.get(row.id)?.actions,
    mayAct: isPresent(),
  }));

  const answer = got.answer;
  const name = lists.length === 2 ? spoken(list.role) : state.kind === "rank" ? "Ranked items" : "Recommended";
  const notes = [`${counted(answer.history_length, "event")} of history`];
  if (answer.unknown_user) {
    notes.push("nobody knows this user");
  }
  if (answer.live_events === false) {
    notes.push("without what happened since the last publication: the event store does not answer");
  }
  if (answer.note) {
    notes.push(answer.note);
  }
  if (!isPresent()) {
    notes.push("a past moment, in which nothing can be clicked");
  }
  notes.push(milliseconds(got.tookMs));
  return list.show(rows, { title: `${name}, version ${answer.model_version}`, note: notes.join(" · ") });
}

// Why -----------------------------------------------------------------------------

function marksOf(row) {
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

function reasons(row) {
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
async function explain(list, row) {
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

function deeds(actions) {
  const did = Object.keys(actions).filter((name) => actions[name]);
  return did.length > 0 ? did.map(spoken).join(", ") : "passed over";
}

function nameOf(id) {
  return state.facts.get(id)?.title ?? `Item ${id}`;
}

// What they do --------------------------------------------------------------------

/* A button of a row was pressed: the event is kept, and the lists are asked for again. */
function act(list, row, one) {
  return guarded(async () => {
    const before = state.posted.get(row.id);
    if (one.isDone(before?.actions)) {
      return;
    }
    if (one.name === "skip" && before !== undefined) {
      tell("That has happened already: an event gains actions and loses none.");
      return;
    }

    // a later act is added to the event of the first one: the same showing of the item
    const shown = before ?? { item_id: row.id, event_time: list.body.request_time_ms, request_features: list.body.request_features, request_id: list.requestId };
    const event = { ...shown, actions: one.actions(before?.actions) };
    const earlier = new Map(list.places);
    const who = state.who;
    const kept = await keepEvent(event);
    if (who !== state.who) {
      return;
    }
    state.posted.set(row.id, event);
    await readTimeline();
    fillMoment();
    const took = await refresh();
    if (took.isLate) {
      return;
    }
    tellChange(one, row.id, earlier.get(row.id), list.places.get(row.id), { ...took, keptMs: kept });
  });
}

/* Post the event; of a typed history it becomes the last line. How long it took, null for none. */
async function keepEvent(event) {
  if (state.who.history !== undefined) {
    const history = state.who.history.filter((row) => row.event !== event.item_id);
    history.push({ item_id: event.item_id, actions: event.actions, event: event.item_id });
    state.who.history = history;
    return null;
  }

  const { answer, tookMs } = await ask("v1/events", { events: [{ user_id: state.who.userId, ...event }] });
  const status = answer.status[0];
  if (status === "over_quota" || status === "conflict") {
    throw new ServerError(`The event was not kept: ${status.replaceAll("_", " ")}.`, 0);
  }
  return tookMs;
}

// Saying what happened --------------------------------------------------------------

function tell(text, kind = "") {
  byId("news").className = kind;
  byId("news").textContent = text;
}

function tellFirst({ numRows, tookMs, rankerMs, isLate }) {
  if (!isLate) {
    const whose = state.who.history === undefined ? `User ${state.who.userId}` : "Your history";
    tell(`${whose}: ${counted(numRows, "item")} ranked in ${milliseconds(tookMs)}${rankerText(rankerMs)}. Now ${labels()} one.`);
  }
}

/* What the buttons of a row say: click, like or skip */
function labels() {
  const words = acts.map((one) => one.label);
  return `${words.slice(0, -1).join(", ")} or ${words.at(-1)}`;
}

function tellChange(one, id, from, to, { moved, numRows, tookMs, rankerMs, keptMs }) {
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

function sentence(text) {
  return text[0].toUpperCase() + text.slice(1);
}

function rankerText(rankerMs) {
  return rankerMs === null ? "" : ` (${milliseconds(rankerMs)} of it in the ranker)`;
}

/* Run `work`; what goes wrong is said on the page. */
async function guarded(work) {
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

async function showHealth() {
  const node = byId("health");
  try {
    const { answer, tookMs } = await ask("readyz");
    const isWhole = answer.live_events;
    node.className = isWhole ? "good" : "poor";
    node.textContent = isWhole ? `Ready, ${milliseconds(tookMs)}` : "Ranking without live events";
  } catch (error) {
    node.className = "bad";
    node.textContent = error.status === 0 ? "The server does not answer" : "Not ready";
  }
}

// Controls ----------------------------------------------------------------------------

function onSubmit(id, work) {
  byId(id).addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(work);
  });
}

onSubmit("user-form", () => chooseUser(readId(byId("user").value.trim(), "user_id")));
onSubmit("typed-form", () => {
  const lines = byId("rows").value.split("\n").filter((line) => line.trim() !== "");
  return chooseHistory(lines.map(readLine));
});
onSubmit("items-form", () => {
  const words = byId("items").value.split(/[\s,]+/).filter((word) => word !== "");
  return rankItems([...new Set(words.map((word) => readId(word, "item_id")))]);
});
byId("items-default").addEventListener("click", () => {
  byId("items").value = state.start.candidates.join(" ");
  guarded(() => rankItems(state.start.candidates));
});

async function rankItems(items) {
  if (items.length === 0) {
    tell("Give one item or more.", "error");
    return;
  }
  state.candidates = items;
  lists.forEach((list) => list.forget());
  showTab("rank");
  tellFirst(await refresh());
}

let settling = 0;
byId("moment").addEventListener("input", () => {
  state.moment = Number(byId("moment").value);
  fillMoment();
  clearTimeout(settling);
  settling = setTimeout(() => guarded(replay), SETTLE_MS);
});

async function replay() {
  const { moved, numRows, tookMs, rankerMs, isLate } = await refresh();
  if (!isLate) {
    const when = isPresent() ? "Now" : `As of ${timeText(momentTime())}`;
    tell(`${when}: ${moved} of ${numRows} in another place. Ranked in ${milliseconds(tookMs)}${rankerText(rankerMs)}.`);
  }
}

byId("order").addEventListener("change", () => guarded(replay));

// Tabs: arrow keys go from one to the other.
const tabs = [byId("tab-rank"), byId("tab-recommend")];

function showTab(kind) {
  state.kind = kind;
  for (const tab of tabs) {
    const isChosen = tab.id === `tab-${kind}`;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
  }
  byId("panel").setAttribute("aria-labelledby", `tab-${kind}`);
}

function chooseTab(kind) {
  if (state.kind === kind || state.who === null) {
    return;
  }
  showTab(kind);
  lists.forEach((list) => list.forget());
  guarded(async () => tellFirst(await refresh()));
}

for (const tab of tabs) {
  tab.addEventListener("click", () => chooseTab(tab.id.replace("tab-", "")));
}
byId("tabs").addEventListener("keydown", (event) => {
  if (["ArrowLeft", "ArrowRight"].includes(event.key)) {
    const other = tabs.find((tab) => tab !== event.target && !tab.hidden);
    other?.focus();
    other?.click();
  }
});

// A server with keys: nothing is asked for before there is one.
if (document.documentElement.hasAttribute("data-keys")) {
  byId("key-form").hidden = false;
  byId("health").textContent = "This server asks for a key";
  onSubmit("key-form", async () => {
    useKey(byId("key").value);
    await begin();
    byId("key-form").hidden = true;
  });
} else {
  guarded(begin);
}
