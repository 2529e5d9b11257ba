// How messages look: Markdown or tokens coloured by probability, the block in progress, and buttons.

import { rendered } from "./markdown.js";

const MASK = " ▒▒";

export function button(words, act, name = words) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = words;
  made.setAttribute("aria-label", name);
  made.addEventListener("click", act);
  return made;
}

function copyButton(text) {
  const made = button("Copy", async () => {
    made.textContent = (await copy(text)) ? "Copied" : "Not copied";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
  return made;
}

// Browsers lend the clipboard only to https and this machine; elsewhere an old command does it.
async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

// The element of one message. `actions` has functions for what may be done with it: edit, retry, remove, and turn(by)
// for the branches, of which `place` is [number, count].
export class MessageView {
  constructor(node, place, actions) {
    this.node = node;
    this.root = document.createElement("article");
    this.root.className = `message ${node.role}`;
    this.root.dataset.id = node.id;
    this.root.setAttribute("aria-label", node.role === "user" ? "You" : `Answer${node.mode ? ` in mode ${node.mode}` : ""}`);
    this.body = this.add("div", "body");
    this.speed = this.add("p", "speed");
    this.failure = this.add("p", "failure");
    this.buttons = this.add("p", "buttons");
    this.places = [];
    this.before = [];
    this.actions = actions;
    this.drawButtons(place);
  }

  add(name, kind) {
    const made = document.createElement(name);
    made.className = kind;
    this.root.append(made);
    return made;
  }

  drawButtons([number, count]) {
    const { edit, retry, remove, turn } = this.actions;
    const who = this.node.role === "user" ? "message" : "answer";
    const all = [copyButton(this.node.content)];
    if (edit) all.push(button("Edit", edit, `Edit this ${who}`));
    if (retry) all.push(button("Regenerate", retry, "Write this answer anew"));
    if (remove) all.push(button("Delete", remove, `Delete this ${who} and what follows`));
    if (count > 1) {
      const at = document.createElement("span");
      at.textContent = `${number} of ${count}`;
      all.push(button("‹", () => turn(-1), "Branch before"), at, button("›", () => turn(1), "Next branch"));
    }
    this.buttons.replaceChildren(...all);
  }

  // Takes the block of a step, with the masks still in it; [] where there is none.
  showBlock(places) {
    this.before = this.places.length === places.length ? this.places : [];
    this.places = places;
  }

  draw(showsTokens) {
    const { node } = this;
    if (showsTokens && node.tokens) this.body.replaceChildren(tokenLine(node.tokens));
    else if (node.role === "user") this.body.replaceChildren(plainText(node.content));
    else this.body.replaceChildren(rendered(node.content, copyButton));
    if (this.places.length) this.end().append(...this.places.map((place, i) => placeSpan(place, this.before[i] ?? null)));
    this.speed.textContent = node.stats ? speedWords(node.stats) : "";
    this.failure.textContent = node.failure ?? "";
    this.failure.classList.toggle("mild", !node.state);
  }

  // Where the block goes on: in the last paragraph, if that is what the text ends with.
  end() {
    const last = this.body.lastElementChild;
    if (last?.matches("p")) return last;
    const made = document.createElement("p");
    this.body.append(made);
    return made;
  }
}

function plainText(text) {
  const made = document.createElement("p");
  made.className = "plain";
  made.textContent = text;
  return made;
}

function tokenLine(tokens) {
  const made = plainText("");
  made.append(...tokens.map(([text, confidence]) => tokenSpan(text, confidence)));
  return made;
}

function tokenSpan(text, confidence) {
  const span = document.createElement("span");
  span.className = "token";
  span.style.setProperty("--sure", confidence);
  span.textContent = text || "·";
  span.title = `probability ${confidence.toFixed(2)}`;
  return span;
}

function placeSpan(place, before) {
  if (place === null) {
    const span = document.createElement("span");
    span.className = "token mask";
    span.textContent = MASK;
    span.setAttribute("aria-hidden", "true");
    return span;
  }
  const span = tokenSpan(place.text ?? "·", place.confidence);
  if (before === null) span.classList.add("new");
  return span;
}

// What an answer cost. `nfe` are passes of the denoiser, `context` those of the context tower.
export function speedWords({ mode, tokens, nfe, context, seconds, used }) {
  const perSecond = seconds > 0 ? (tokens / seconds).toFixed(0) : "0";
  const passes = nfe > 0 ? `${nfe} NFE, ${(tokens / nfe).toFixed(1)} tokens each` : `${context} passes`;
  // Without the prompt's pass
  const each = nfe > 0 && nfe + context > 1 ? `, ${(tokens / (nfe + context - 1)).toFixed(1)} per pass of either tower` : "";
  return `${mode}: ${tokens} tokens, ${perSecond} tokens/s, ${passes}${each}; ${used} tokens of context`;
}
