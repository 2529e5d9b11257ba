// Conversations and choices, kept in this browser.

const CHAT = "twotower.chat.";
const CHOICES = "twotower.choices";

// All conversations, the newest first. What can't be read, such as another version's, is left out and left alone.
export function allChats() {
  const chats = Object.keys(localStorage)
    .filter((key) => key.startsWith(CHAT))
    .map((key) => read(key))
    .filter((chat) => Array.isArray(chat?.nodes));
  return chats.sort((one, other) => other.changed - one.changed);
}

// Throws an Error where the browser has no room left.
export function saveChat(chat) {
  write(CHAT + chat.id, chat);
}

export function deleteChat(chat) {
  localStorage.removeItem(CHAT + chat.id);
}

export function isChat(key) {
  return key === null || key.startsWith(CHAT);
}

export function choices() {
  return { mode: "", other: "", tokens: false, values: {}, ...read(CHOICES) };
}

export function saveChoices(value) {
  write(CHOICES, value);
}

// The key is forgotten with the tab.
export function apiKey() {
  return sessionStorage.getItem("twotower.key") ?? "";
}

export function saveApiKey(key) {
  sessionStorage.setItem("twotower.key", key);
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    throw new Error("This browser has no room for more conversations: export some, and delete them here.");
  }
}
