// The list of conversations: open, search, rename, delete, import and export.

import { exported, imported, make, matches, newId, title } from "./conversation.js";
import * as store from "./store.js";

const byId = (id) => document.getElementById(id);

// `page` has `open(chat)`, `say(words, bad)`, and `current()`, the conversation that is shown.
export function showSide(page) {
  let locked = false;

  function draw() {
    const shown = page.current();
    const words = byId("search").value.trim();
    const found = store.allChats().filter((chat) => !words || matches(chat, words));
    byId("chats").replaceChildren(...found.map((chat) => entry(chat, chat.id === shown.id)));
  }

  function entry(chat, isShown) {
    const item = document.createElement("li");
    item.classList.toggle("shown", isShown);
    const name = tool(title(chat), "open", () => show(chat));
    if (isShown) name.setAttribute("aria-current", "true");
    item.append(
      name,
      tool("Rename", "tool", () => rename(item, chat)),
      tool("Export", "tool", () => download([chat])),
      tool("Delete", "tool", () => drop(chat)),
    );
    return item;
  }

  function tool(words, kind, act) {
    const made = document.createElement("button");
    made.type = "button";
    made.className = kind;
    made.textContent = words;
    made.disabled = locked && kind !== "tool";
    made.addEventListener("click", act);
    return made;
  }

  function show(chat) {
    if (locked) return;
    narrow(false);
    page.open(chat);
    byId("entry").focus();
  }

  function rename(item, chat) {
    const field = document.createElement("input");
    field.value = title(chat);
    field.setAttribute("aria-label", "Name of the conversation");
    const done = () => {
      // The one on the page is another object with the same id.
      const kept = page.current().id === chat.id ? page.current() : chat;
      kept.title = field.value.trim();
      keep(kept);
      if (kept === page.current() && !locked) page.open(kept);
      draw();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") field.blur();
      if (event.key === "Escape") {
        event.stopPropagation();
        field.value = title(chat);
        field.blur();
      }
    });
    field.addEventListener("blur", done, { once: true });
    item.replaceChildren(field);
    field.select();
  }

  function drop(chat) {
    const isShown = chat.id === page.current().id;
    if ((isShown && locked) || !confirm(`Delete “${title(chat)}”?`)) return;
    store.deleteChat(chat);
    if (isShown) page.open(make());
    draw();
  }

  function keep(chat) {
    try {
      store.saveChat(chat);
    } catch (error) {
      page.say(error.message, true);
    }
  }

  async function take(file) {
    try {
      const chats = imported(await file.text());
      chats.forEach((chat) => keep({ ...chat, id: newId() }));
      page.say(`${chats.length} ${chats.length === 1 ? "conversation" : "conversations"} imported.`);
    } catch (error) {
      page.say(error.message, true);
    }
    draw();
  }

  function narrow(isOpen) {
    byId("side").classList.toggle("open", isOpen);
    byId("open-side").setAttribute("aria-expanded", isOpen);
  }

  byId("search").addEventListener("input", draw);
  byId("new").addEventListener("click", () => show(make(page.current().system)));
  byId("open-side").addEventListener("click", () => {
    narrow(true);
    byId("new").focus();
  });
  byId("close-side").addEventListener("click", () => narrow(false));
  byId("import").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", async () => {
    await take(byId("file").files[0]);
    byId("file").value = "";
  });
  byId("export").addEventListener("click", () => download(store.allChats()));
  window.addEventListener("storage", (event) => store.isChat(event.key) && draw());

  return {
    draw,
    // While an answer comes, its conversation stays open.
    lock(is) {
      locked = is;
      byId("new").disabled = is;
      draw();
    },
    // Shows the newest conversation, or a new one.
    start() {
      page.open(store.allChats()[0] ?? make());
    },
  };
}

function download(chats) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exported(chats)], { type: "application/json" }));
  link.download = chats.length === 1 ? `${title(chats[0]).replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "chat"}.json` : "chats.json";
  link.click();
  URL.revokeObjectURL(link.href);
}
