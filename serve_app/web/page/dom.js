/* Making elements. Text goes in as text: nothing that a server sends is ever read as HTML. */

export function byId(id) {
  return document.getElementById(id);
}

/* make("button", { class: "act", onclick: press }, "Click") */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) {
      element.addEventListener(name.slice(2), value);
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/* A word for people from a column's name: is_profile_enter -> profile enter */
export function spoken(name) {
  return name.replace(/^is_/, "").replaceAll("_", " ");
}

export function counted(number, one, many = `${one}s`) {
  return `${number.toLocaleString()} ${number === 1 ? one : many}`;
}

export function percent(share) {
  const number = 100 * share;
  return `${number.toFixed(number < 1 ? 2 : 1)} %`;
}

const moments = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export function timeText(ms) {
  return moments.format(new Date(ms));
}

export function milliseconds(ms) {
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}
