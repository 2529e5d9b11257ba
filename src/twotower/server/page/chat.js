// The chat: asks the server, keeps what was said, and shows it.

import { about, Refused, watched } from "./api.js";
import * as tree from "./conversation.js";
import { button, MessageView } from "./message.js";
import { showFields } from "./settings.js";
import { showSide } from "./side.js";
import * as store from "./store.js";

const SAVE_EVERY = 500; // ms, while an answer comes
const byId = (id) => document.getElementById(id);

const chosen = store.choices();
let server = null;
let chat = tree.make();
let views = [];
let running = null; // aborts the answers that come

function say(words, bad = false) {
  byId("status").textContent = words;
  byId("status").classList.toggle("bad", bad);
}

function save() {
  chat.changed = Date.now();
  try {
    store.saveChat(chat);
  } catch (error) {
    say(error.message, true);
  }
  side.draw(chat);
}

// Answers `question` in the mode that is chosen, and in a second one beside it where two are compared.
async function answer(question, modes = chosen.other ? [chosen.mode, chosen.other] : [chosen.mode]) {
  if (running !== null || server === null) return;
  running = new AbortController();
  const group = modes.length > 1 ? tree.newId() : undefined;
  const nodes = modes.map((mode) => tree.add(chat, question, "assistant", "", { mode, group, tokens: [], state: "writing" }));
  tree.choose(chat, nodes[0]);
  const saving = setInterval(save, SAVE_EVERY);
  save();
  draw();
  busy(true);
  try {
    await Promise.all(nodes.map((node) => write(node, question, running.signal)));
  } finally {
    clearInterval(saving);
    running = null;
    busy(false);
  }
  nodes.filter((node) => !node.content && node.state === "stopped").forEach((node) => tree.remove(chat, node));
  save();
  draw();
}

async function write(node, question, signal) {
  const view = views.find((one) => one.node === node);
  let pending = false;
  const show = () => {
    pending = false;
    view.draw(chosen.tokens);
    follow();
  };
  try {
    for await (const step of watched(request(node, question), store.apiKey(), signal)) {
      node.content += step.text;
      step.tokens.forEach((token) => node.tokens.push([token.text ?? "", token.confidence]));
      view.showBlock(step.block?.places ?? []);
      if (step.result) finish(node, step.result);
      if (!pending) requestAnimationFrame(show);
      pending = true;
    }
  } catch (error) {
    fail(node, error);
  }
}

function finish(node, result) {
  delete node.state;
  node.content = result.text;
  node.stats = {
    mode: node.mode,
    tokens: result.num_tokens,
    nfe: result.denoiser_calls,
    context: result.context_calls,
    seconds: result.seconds_total,
    used: result.prompt_tokens + result.num_tokens,
  };
  if (result.finish_reason !== "length") return;
  const full = node.stats.used >= server.max_context;
  node.failure = full
    ? `The context of ${server.max_context} tokens is full. Nothing was dropped, but nothing more fits: begin a new chat, or edit an earlier message.`
    : "The answer was cut off at its greatest length; max tokens in the settings gives it more.";
}

function fail(node, error) {
  if (error.name === "AbortError") {
    node.state = "stopped";
    node.failure = "Stopped.";
    return;
  }
  if (!(error instanceof Refused)) throw error;
  node.state = "failed";
  const advice = {
    429: " Regenerate asks again.",
    400: error.code === "context_length_exceeded" ? " Nothing was dropped: begin a new chat, or edit an earlier message." : "",
  };
  node.failure = error.message + (advice[error.status] ?? "");
  if (error.status === 401) openSettings();
}

function request(node, question) {
  const said = tree.messages(chat, question);
  const settings = { mode: node.mode, ...chosen.values };
  return server.has_chat_template ? { messages: said, ...settings } : { prompt: tree.plainForm(said), stop: [tree.PLAIN_STOP], ...settings };
}

function busy(is) {
  byId("send").disabled = is;
  byId("stop").disabled = !is;
  byId("messages").setAttribute("aria-busy", is);
  side.lock(is);
  say(is ? "Writing…" : "");
}

// Keeps the newest text in view, unless the reader has scrolled up.
function follow() {
  const box = byId("messages");
  if (box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

function draw() {
  views = [];
  const parts = tree.path(chat).map((node) => {
    const compared = node.group ? tree.siblings(chat, node).filter((one) => one.group === node.group) : [];
    if (compared.length < 2) return message(node);
    const pair = document.createElement("div");
    pair.className = "pair";
    pair.append(...compared.map((one) => comparedMessage(one, one === node)));
    return pair;
  });
  byId("messages").replaceChildren(...(parts.length ? parts : [nothing()]));
  byId("messages").scrollTop = byId("messages").scrollHeight;
  byId("title").textContent = tree.title(chat);
}

function nothing() {
  const made = document.createElement("p");
  made.className = "empty";
  made.textContent = "Write a message below. Masks turn into tokens while an answer is written.";
  return made;
}

function message(node) {
  const among = tree.siblings(chat, node);
  const at = among.indexOf(node);
  const view = new MessageView(node, [at + 1, among.length], {
    edit: () => edit(view),
    retry: node.role === "assistant" ? () => answer(tree.parentOf(chat, node)) : null,
    remove: () => free() && confirm("Delete this message and all that follows it?") && change(() => tree.remove(chat, node)),
    turn: (by) => free() && change(() => tree.choose(chat, among[(at + by + among.length) % among.length])),
  });
  if (node.state === "writing" && running === null) node.failure = "The page was left while this was written. Regenerate writes it anew.";
  view.root.classList.toggle("writing", node.state === "writing" && running !== null);
  if (node.role === "user" && tree.children(chat, node.id).length === 0) view.buttons.append(button("Answer", () => answer(node), "Answer this message"));
  view.draw(chosen.tokens);
  views.push(view);
  return view.root;
}

function comparedMessage(node, isShown) {
  const root = message(node);
  root.classList.toggle("shown", isShown);
  if (!isShown) views[views.length - 1].buttons.append(button("Go on with this", () => free() && change(() => tree.choose(chat, node))));
  return root;
}

function free() {
  return running === null;
}

function change(act) {
  act();
  save();
  draw();
}

// Puts a field in the place of a message. What is sent becomes a branch beside it, or replaces an answer's text.
function edit(view) {
  if (!free()) return;
  const { node } = view;
  const form = document.createElement("form");
  const field = document.createElement("textarea");
  form.className = "edit";
  field.value = node.content;
  field.setAttribute("aria-label", "Edited message");
  const done = button(node.role === "user" ? "Send" : "Save", () => form.requestSubmit());
  form.append(field, done, button("Cancel", draw));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const parent = tree.parentOf(chat, node);
    const made = tree.add(chat, parent, node.role, field.value);
    change(() => {});
    if (node.role === "user") answer(made);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") draw();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  view.body.replaceChildren(form);
  view.buttons.replaceChildren();
  field.focus();
}

function open(other) {
  chat = other;
  byId("system").value = chat.system;
  draw();
  side.draw(chat);
  say("");
}

function openSettings() {
  byId("system").value = chat.system;
  if (!byId("settings").open) byId("settings").showModal();
  if (server === null) byId("key").focus();
}

function offerModes(modes, usual) {
  const options = () => modes.map((mode) => new Option(mode.name, mode.name));
  byId("mode").replaceChildren(...options());
  byId("other").replaceChildren(new Option("none", ""), ...options());
  const names = modes.map((mode) => mode.name);
  chosen.mode = names.includes(chosen.mode) ? chosen.mode : usual;
  chosen.other = names.includes(chosen.other) ? chosen.other : "";
  byId("mode").value = chosen.mode;
  byId("other").value = chosen.other;
}

function showSettings() {
  const known = new Set(server.settings.map((setting) => setting.name));
  Object.keys(chosen.values).forEach((name) => known.has(name) || delete chosen.values[name]);
  showFields(byId("fields"), server.settings, chosen.values, () => store.saveChoices(chosen));
}

async function begin() {
  try {
    server = await about(store.apiKey());
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(error.message, true);
    if (error.status === 401) openSettings();
    return;
  }
  say("");
  byId("model").textContent = server.model;
  byId("banner").hidden = server.has_chat_template;
  byId("banner").textContent = server.has_chat_template ? "" : "This model has no chat template: messages are written as plain lines of “User:” and “Assistant:”.";
  offerModes(server.modes, server.default_mode);
  showSettings();
}

const side = showSide({ open, say, current: () => chat });
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("entry").value.trim();
  if (!text || !free()) return;
  if (server === null) return void begin();
  const shown = tree.path(chat);
  let parent = shown[shown.length - 1] ?? null;
  // A message that got no answer makes room for the new one, which becomes a branch beside it.
  if (parent?.role === "assistant" && !parent.content) parent = tree.parentOf(chat, parent);
  if (parent?.role === "user") parent = tree.parentOf(chat, parent);
  byId("entry").value = "";
  answer(tree.add(chat, parent, "user", text));
});
byId("entry").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("open-settings").addEventListener("click", openSettings);
byId("system").addEventListener("change", () => {
  chat.system = byId("system").value.trim();
  if (chat.nodes.length) save();
});
byId("key").value = store.apiKey();
byId("key").addEventListener("change", () => {
  store.saveApiKey(byId("key").value.trim());
  begin();
});
byId("reset").addEventListener("click", () => {
  chosen.values = {};
  store.saveChoices(chosen);
  if (server !== null) showSettings();
});
for (const name of ["mode", "other"]) {
  byId(name).addEventListener("change", () => {
    chosen[name] = byId(name).value;
    store.saveChoices(chosen);
  });
}
byId("tokens").checked = chosen.tokens;
byId("tokens").addEventListener("change", () => {
  chosen.tokens = byId("tokens").checked;
  store.saveChoices(chosen);
  views.forEach((view) => view.draw(chosen.tokens));
});
side.start();
begin();
