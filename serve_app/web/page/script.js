/* The page: whose list, as of when, and what happens to it when they act.

   server.js asks; lists.js, timeline.js, reasons.js and news.js show; state.js is all that is
   remembered. */

import { byId, counted, make, milliseconds, spoken, timeText } from "./dom.js";
import { ItemList } from "./lists.js";
import { guarded, rankerText, tell, tellChange, tellFirst } from "./news.js";
import { explain, marksOf, reasons } from "./reasons.js";
import { ask, ServerError, useKey } from "./server.js";
import { future, isPresent, learn, momentTime, present, state } from "./state.js";
import { findMoments, showTimeline } from "./timeline.js";

const HEALTH_MS = 10_000;
const SETTLE_MS = 150; // a slider that moves is asked for when it rests
const MINUTE_MS = 60_000;
const ANY = "any"; // in the box of a request column that is not sent
const AS_THEN = "as then"; // in that of a text of which only the code is known: the code is sent

// To begin with ---------------------------------------------------------------

async function begin() {
  state.model = (await ask("v1/model")).answer;
  state.start = (await ask("page/start", {})).answer;
  state.openedAt = performance.now();
  state.candidates = state.start.candidates;
  state.acts = findActs(state.model);

  const roles = Object.keys(state.start.trial_keys); // champion, perhaps canary
  state.lists = roles.map((role) => {
    const list = new ItemList(role, state.acts, act, explain);
    list.role = role;
    return list;
  });
  byId("panel").replaceChildren(...state.lists.map((list) => list.element));
  byId("panel").classList.toggle("two", state.lists.length === 2);

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
  const inputs = model.request_features.map((name) => make("label", {}, `${spoken(name)} `, featureInput(name)));
  byId("features").replaceChildren("sent along:", ...inputs);
  byId("features").hidden = inputs.length === 0;

  byId("items").value = state.candidates.join(" ");
  byId("rows").placeholder = [12, 7].map((item, i) => `${item}${i === 0 ? ` ${state.acts[0].label}` : ""}`).join("\n");
  byId("tab-recommend").hidden = model.index === null;
}

/* The box of a request column: for its text where the logs have text, for a number elsewhere. */
function featureInput(name) {
  const kind = state.model.text_features.includes(name)
    ? { type: "text", size: "10", spellcheck: "false", oninput: (event) => forgetCode(event.target) }
    : { type: "number", min: "0", size: "4" };
  return make("input", { ...kind, "data-feature": name, placeholder: ANY, onchange: () => guarded(replay) });
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
  state.lists.forEach((list) => list.forget());
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
  const actions = Object.fromEntries(state.acts.flatMap((one) => (one.name === "skip" ? [] : [[one.name, false]])));
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

/* The slider, what it says, and the request features of that moment. */
function fillMoment() {
  const slider = byId("moment");
  slider.max = state.moments.length;
  slider.value = state.moment;
  slider.disabled = state.moments.length === 0;
  sayMoment();

  const next = isPresent() ? state.rows.at(-1) : state.rows[future()];
  for (const input of document.querySelectorAll("[data-feature]")) {
    fillFeature(input, next?.request_features[input.dataset.feature]);
  }
}

/* What a row has of a request column; undefined for nothing. */
function fillFeature(input, value) {
  forgetCode(input);
  if (value === undefined || input.type === "number") {
    input.value = value ?? "";
    return;
  }
  input.value = knownTexts(input.dataset.feature).get(value) ?? "";
  if (input.value === "") {
    input.dataset.code = value;
    input.placeholder = AS_THEN;
  }
}

function forgetCode(input) {
  delete input.dataset.code;
  input.placeholder = ANY;
}

/* code -> text, of what was posted here: the server keeps codes alone. */
function knownTexts(name) {
  const found = new Map();
  for (const row of state.rows) {
    const event = state.posted.get(row.item_id);
    const text = event?.request_features[name];
    if (typeof text === "string" && event.event_time === row.event_time) {
      found.set(row.request_features[name], text);
    }
  }
  return found;
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
    const isText = input.type === "text" && input.value !== "";
    const value = isText ? input.value : input.dataset.code ?? input.value;
    if (value !== "") {
      found[input.dataset.feature] = isText ? value : Number(value);
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

/* A popular list is in the order of counts, others in that of a task's scores. */
function recommendedRow(item, answer) {
  const orderedBy = answer.ordered_by;
  const orderedAs = orderedBy === "popularity" ? item.why.popularity : item.score;
  const scores = { [orderedBy]: orderedAs, ...item.why.scores };
  return { id: item.item_id, scores, orderedBy, found: item.why };
}

/* Ask for the lists and show them; how many rows of the first one moved, and how long it took. */
async function refresh() {
  const turn = ++state.turn;
  const answers = await Promise.all(state.lists.map(askList));
  const ids = answers.flatMap(({ items }) => items.flatMap((row) => [row.id, ...relatives(row)]));
  await learn(ids);
  if (turn !== state.turn) {
    return { moved: 0, isLate: true };
  }

  const moved = answers.map((got, i) => showList(state.lists[i], got));
  showTimeline(byId("timeline"), byId("timeline-text"), state.rows, state.facts, { numEvents: state.numEvents, future: future() });
  sayMoment();
  return { moved: moved[0], numRows: answers[0].items.length, tookMs: answers[0].tookMs, rankerMs: answers[0].rankerMs };
}

function relatives(row) {
  return (row.found?.like ?? []).map((like) => like.item_id);
}

function showList(list, got) {
  list.body = got.body;
  list.requestId = got.answer.request_id;
  const rows = got.items.map((row) => ({
    ...row,
    fact: state.facts.get(row.id),
    marks: marksOf(row),
    why: reasons(row),
    done: state.posted.get(row.id)?.actions,
    mayAct: isPresent(),
  }));

  const answer = got.answer;
  const name = state.lists.length === 2 ? spoken(list.role) : state.kind === "rank" ? "Ranked items" : "Recommended";
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
  state.lists.forEach((list) => list.forget());
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
  state.lists.forEach((list) => list.forget());
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
