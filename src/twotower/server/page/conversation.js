// Conversations as trees of messages: a message that is edited, or an answer that is written anew, is a branch beside
// the old one. Nothing here touches the page.

const ROOT = "root";

export function newId() {
  return `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`;
}

// `nodes` are all messages, each with the id of its `parent`; `chosen` says which child of a message is shown.
export function make(system = "") {
  return { id: newId(), title: "", system, changed: Date.now(), nodes: [], chosen: {} };
}

export function children(chat, parent) {
  return chat.nodes.filter((node) => node.parent === parent);
}

// The messages that are shown, from the first on.
export function path(chat) {
  const found = [];
  for (let parent = ROOT; ; ) {
    const among = children(chat, parent);
    if (among.length === 0) return found;
    const node = among.find((one) => one.id === chat.chosen[parent]) ?? among[among.length - 1];
    found.push(node);
    parent = node.id;
  }
}

// Adds a message behind `parent` (null begins the conversation) and shows it.
export function add(chat, parent, role, content, more = {}) {
  const node = { id: newId(), parent: parent?.id ?? ROOT, role, content, ...more };
  chat.nodes.push(node);
  choose(chat, node);
  return node;
}

export function choose(chat, node) {
  chat.chosen[node.parent] = node.id;
}

export function siblings(chat, node) {
  return children(chat, node.parent);
}

export function parentOf(chat, node) {
  return chat.nodes.find((one) => one.id === node.parent) ?? null;
}

// Removes a message with all that follows it.
export function remove(chat, node) {
  const gone = new Set([node.id]);
  // parents come before their children
  chat.nodes.forEach((one) => gone.has(one.parent) && gone.add(one.id));
  chat.nodes = chat.nodes.filter((one) => !gone.has(one.id));
  gone.forEach((id) => delete chat.chosen[id]);
  if (chat.chosen[node.parent] === node.id) delete chat.chosen[node.parent];
}

// The messages as the server takes them, up to and with `last`.
export function messages(chat, last) {
  const shown = path(chat);
  const until = shown.slice(0, shown.indexOf(last) + 1);
  const system = chat.system ? [{ role: "system", content: chat.system }] : [];
  return [...system, ...until.map(({ role, content }) => ({ role, content }))];
}

// The prompt for a model without a chat template, and where its answer ends: the form that `twotower chat` uses.
export const PLAIN_STOP = "\nUser:";
export function plainForm(said) {
  const names = { user: "User: ", assistant: "Assistant: " };
  return `${said.map((m) => (names[m.role] ?? "") + m.content.trim()).join("\n\n")}\n\nAssistant:`;
}

export function title(chat) {
  const first = chat.nodes.find((node) => node.role === "user")?.content.trim().split("\n")[0] ?? "";
  return chat.title || (first.length > 60 ? `${first.slice(0, 60)}…` : first) || "New chat";
}

export function matches(chat, words) {
  const text = [title(chat), chat.system, ...chat.nodes.map((node) => node.content)].join("\n").toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

// The text of a file with conversations. `messages` are those shown, which other programs read; `tree` has all.
export function exported(chats) {
  const conversations = chats.map((chat) => {
    const shown = path(chat);
    return {
      title: title(chat),
      messages: shown.length ? messages(chat, shown[shown.length - 1]) : [],
      tree: { ...chat },
    };
  });
  return JSON.stringify({ conversations }, null, 1);
}

// The conversations of a file, with new ids. Throws an Error that says what is wrong with it.
export function imported(text) {
  let raw;
  try {
    raw = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  const list = raw?.conversations ?? [Array.isArray(raw) ? { messages: raw } : raw];
  if (!Array.isArray(list)) throw new Error("The file has no list of conversations.");
  return list.map((one, i) => {
    const chat = fromTree(one?.tree) ?? fromMessages(one?.messages);
    if (chat === null) throw new Error(`Conversation ${i + 1} of the file has no list of messages with role and content.`);
    if (typeof one.title === "string") chat.title = one.title;
    return chat;
  });
}

const isText = (value) => typeof value === "string";
const isMessage = (one) => isText(one?.content) && ["system", "developer", "user", "assistant"].includes(one?.role);

function fromMessages(list) {
  if (!Array.isArray(list) || !list.every(isMessage)) return null;
  const chat = make();
  let last = null;
  for (const { role, content } of list) {
    if (role === "user" || role === "assistant") last = add(chat, last, role, content);
    else chat.system = [chat.system, content].filter(Boolean).join("\n\n");
  }
  return chat;
}

function fromTree(tree) {
  const known = new Set([ROOT]);
  const isNode = (one) => isMessage(one) && isText(one.id) && known.has(one.parent) && known.add(one.id);
  if (!Array.isArray(tree?.nodes) || !tree.nodes.every(isNode)) return null;
  const chat = make(isText(tree.system) ? tree.system : "");
  chat.nodes = tree.nodes.map(({ id, parent, role, content, tokens, stats }) => ({
    id, parent, role, content,
    ...(isTokens(tokens) ? { tokens } : {}),
    ...(isStats(stats) ? { stats } : {}),
  }));
  for (const [parent, id] of Object.entries(tree.chosen ?? {})) if (known.has(parent) && known.has(id)) chat.chosen[parent] = id;
  return chat;
}

const isTokens = (value) => Array.isArray(value) && value.every((one) => Array.isArray(one) && isText(one[0]) && Number.isFinite(one[1]));
const isStats = (value) => isText(value?.mode) && ["tokens", "nfe", "context", "seconds", "used"].every((name) => Number.isFinite(value[name]));
