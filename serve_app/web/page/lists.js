/* One list of items, the best first. Rows keep their elements, so that they move when the order
   changes, and the keyboard stays where it was. */

import { counted, make, percent, spoken } from "./dom.js";

const MOVE = { duration: 450, easing: "cubic-bezier(.2, .7, .2, 1)" };

export class ItemList {
  /* `acts`: [{ name, label }], what can be done with a row; `press(list, row, act)` does it.
     `explain(list, row)` promises more reasons than a row has; it is asked when somebody wants them. */
  constructor(name, acts, press, explain) {
    this.acts = acts;
    this.press = press;
    this.explain = explain;
    this.rows = new Map(); // item id -> its element
    this.places = new Map(); // item id -> place of the last time, 1 is best
    this.title = make("h2", {}, name);
    this.note = make("p", { class: "quiet" });
    this.list = make("ol", { class: "items", "aria-label": name });
    this.list.addEventListener("keydown", (event) => this.moveFocus(event));
    this.element = make("section", { class: "list", "aria-label": name }, this.title, this.note, this.list);
  }

  forget() {
    this.places.clear();
  }

  /* Show `rows` (best first) and return how many changed places.

     A row: { id, fact, scores, orderedBy, marks, why, done, mayAct }. */
  show(rows, { title, note }) {
    this.title.textContent = title;
    this.note.textContent = note;

    const focused = document.activeElement;
    const before = new Map();
    for (const [id, element] of this.rows) {
      before.set(id, element.getBoundingClientRect().top);
    }

    const best = Math.max(...rows.map((row) => row.scores[row.orderedBy] ?? 0), 1e-9);
    const elements = new Map();
    let moved = 0;
    rows.forEach((row, index) => {
      const place = index + 1;
      const earlier = this.places.get(row.id);
      const element = this.rows.get(row.id) ?? this.makeRow();
      moved += earlier !== undefined && earlier !== place ? 1 : 0;
      this.fillRow(element, row, { place, earlier, isFirstTime: this.places.size === 0, best });
      elements.set(row.id, element);
    });

    this.list.replaceChildren(...elements.values());
    this.rows = elements;
    this.places = new Map(rows.map((row, index) => [row.id, index + 1]));
    if (this.list.contains(focused)) {
      focused.focus({ preventScroll: true });
    }
    this.animate(before);
    return moved;
  }

  makeRow() {
    const parts = {
      place: make("span", { class: "place" }),
      change: make("span", { class: "change" }),
      picture: make("img", { class: "picture", alt: "", hidden: true, referrerpolicy: "no-referrer" }),
      title: make("span", { class: "title" }),
      marks: make("span", { class: "marks" }),
      scores: make("span", { class: "scores" }),
      acts: make("span", { class: "acts" }),
      more: make("button", { class: "act more", type: "button", "aria-expanded": "false" }, "why?"),
      why: make("ul", { class: "why", hidden: true }),
    };
    parts.more.addEventListener("click", () => {
      parts.why.hidden = !parts.why.hidden;
      parts.more.setAttribute("aria-expanded", String(!parts.why.hidden));
      this.fillReasons(element);
    });

    parts.buttons = this.acts.map((act) => {
      const press = () => this.press(this, element.row, act);
      return make("button", { class: "act", type: "button", "data-act": act.name, onclick: press }, act.label);
    });
    parts.acts.append(...parts.buttons, parts.more);

    const head = make("span", { class: "head" }, parts.place, parts.change);
    const item = make("span", { class: "item" }, parts.picture, parts.title, parts.marks);
    const element = make("li", {}, head, item, parts.scores, parts.acts, parts.why);
    element.parts = parts;
    return element;
  }

  fillRow(element, row, { place, earlier, isFirstTime, best }) {
    const parts = element.parts;
    element.row = row;
    element.dataset.item = row.id;

    const name = row.fact?.title ?? `Item ${row.id}`;
    parts.title.textContent = name;
    parts.place.textContent = place;
    showChange(parts.change, place, earlier, isFirstTime);
    showPicture(parts.picture, row.fact?.picture);
    parts.marks.replaceChildren(...row.marks.map((mark) => make("span", { class: `mark ${mark.kind ?? ""}` }, mark.text)));
    parts.scores.replaceChildren(...Object.entries(row.scores).map(([task, score]) => scoreOf(task, score, row.orderedBy, best)));
    this.fillReasons(element);
    parts.more.setAttribute("aria-label", `why? ${name}`);
    parts.buttons.forEach((button, index) => {
      const act = this.acts[index];
      button.hidden = !row.mayAct;
      button.setAttribute("aria-label", `${act.label}: ${name}`);
      button.setAttribute("aria-pressed", String(act.isDone(row.done)));
    });
  }

  /* Why the row has its score, where somebody has asked. */
  async fillReasons(element) {
    const { row, parts } = element;
    if (parts.why.hidden) {
      return;
    }
    const items = (reasons) => reasons.map((reason) => make("li", {}, reason));
    const first = items(row.why);
    parts.why.replaceChildren(...first, make("li", {}, "…"));
    const more = await this.explain(this, row);
    if (element.row === row) {
      parts.why.replaceChildren(...first, ...items(more));
    }
  }

  /* Rows glide from where they were. */
  animate(before) {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
      return;
    }
    for (const [id, element] of this.rows) {
      const from = before.get(id);
      const shift = from === undefined ? 0 : from - element.getBoundingClientRect().top;
      if (shift !== 0) {
        element.animate([{ transform: `translateY(${shift}px)` }, { transform: "none" }], MOVE);
      }
    }
  }

  /* Arrow up and down go to the same button of the row above or below. */
  moveFocus(event) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const row = event.target.closest("li[data-item]");
    if (step === undefined || row === null) {
      return;
    }
    const buttons = [...row.querySelectorAll("button")];
    const column = buttons.indexOf(event.target);
    const other = step === 1 ? row.nextElementSibling : row.previousElementSibling;
    if (other !== null && column !== -1) {
      other.querySelectorAll("button")[column].focus();
      event.preventDefault();
    }
  }
}

function showChange(node, place, earlier, isFirstTime) {
  node.className = "change";
  node.removeAttribute("aria-label");
  if (isFirstTime || earlier === place) {
    node.textContent = "";
  } else if (earlier === undefined) {
    node.textContent = "new";
  } else {
    const up = earlier - place;
    node.classList.add(up > 0 ? "up" : "down");
    node.textContent = up > 0 ? `▲${up}` : `▼${-up}`;
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", `${counted(Math.abs(up), "place")} ${up > 0 ? "up" : "down"}`);
  }
}

function showPicture(node, address) {
  node.hidden = !address;
  if (address && node.getAttribute("src") !== address) {
    node.setAttribute("src", address);
  }
}

function scoreOf(task, score, orderedBy, best) {
  const isOrder = task === orderedBy;
  const bar = make("span", { class: "bar", "aria-hidden": "true" });
  bar.style.width = `${Math.max(0, Math.min(100, (100 * score) / best))}%`;
  return make(
    "span",
    { class: isOrder ? "score order" : "score" },
    make("span", { class: "task" }, spoken(task)),
    make("span", { class: "number" }, scoreText(task, score)),
    isOrder ? make("span", { class: "track", "aria-hidden": "true" }, bar) : null,
  );
}

/* Probabilities in percent; what is only popular has a count. */
function scoreText(task, score) {
  if (task === "popularity") {
    return score.toLocaleString();
  }
  return percent(score);
}
