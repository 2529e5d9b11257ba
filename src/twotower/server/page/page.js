// The form, the requests to the server, and the replay.

import { about, watched } from "./api.js";
import { Panel, plain } from "./panel.js";

const SHOWN_AT_FIRST = ["ar", "diffusion", "verified"];
const STEPS_IN_LEGEND = 16;
const REPLAY_SECONDS = 5;
const byId = (id) => document.getElementById(id);

let known = []; // the modes that the server has
let panels = [];
let stopping = null; // aborts the running requests
let replaying = 0; // the animation frame of a running replay, 0 if there is none

function say(message, bad = false) {
  byId("status").textContent = message;
  byId("status").classList.toggle("bad", bad);
}

function settings() {
  const number = (id) => byId(id).valueAsNumber;
  const names = ["max_tokens", "temperature", "seed", "block_size", "confidence_threshold"];
  return { prompt: byId("prompt").value, ...Object.fromEntries(names.map((name) => [name, number(name)])) };
}

async function write(panel, request, signal) {
  for await (const step of watched({ ...request, mode: panel.mode }, byId("key").value, signal)) panel.take(step);
}

async function run() {
  cancelAnimationFrame(replaying);
  const request = settings();
  const chosen = [...document.querySelectorAll("#modes input:checked")].map((box) => box.value);
  const modes = known.filter((mode) => chosen.includes(mode.name));
  if (modes.length === 0) return say("Choose at least one mode.", true);
  panels = modes.map((mode) => {
    const root = byId("panel").content.firstElementChild.cloneNode(true);
    byId("panels").append(root);
    return new Panel(mode, request.prompt, root);
  });
  byId("panels").replaceChildren(...[...byId("panels").children].slice(-panels.length));
  stopping = new AbortController();
  busy(true);
  say("Writing…");
  const outcomes = await Promise.allSettled(panels.map((panel) => write(panel, request, stopping.signal)));
  busy(false);
  const failed = outcomes.map((outcome, i) => [outcome, panels[i]]).filter(([outcome]) => outcome.reason);
  failed.forEach(([outcome, panel]) => panel.fail(outcome.reason.name === "AbortError" ? "stopped" : outcome.reason.message));
  const finished = panels.filter((panel) => panel.result !== null);
  const words = finished.map((panel) => `${panel.mode} ${panel.result.num_tokens} tokens in ${panel.result.seconds_total.toFixed(2)} s`);
  say(failed.length ? `Not finished: ${failed.map(([, panel]) => panel.mode).join(", ")}.` : `Done: ${words.join("; ")}.`, failed.length > 0);
}

function busy(is) {
  byId("run").disabled = is;
  byId("stop").disabled = !is;
  byId("replay").disabled = is || panels.every((panel) => panel.steps.length === 0);
}

// Shows again how all texts were written, stretched to REPLAY_SECONDS.
function replay() {
  cancelAnimationFrame(replaying);
  const whole = Math.max(...panels.map((panel) => panel.seconds));
  const began = performance.now();
  const frame = (now) => {
    const at = ((now - began) / 1000 / REPLAY_SECONDS) * whole;
    panels.forEach((panel) => panel.show(panel.stepsAt(at)));
    replaying = at < whole ? requestAnimationFrame(frame) : 0;
  };
  replaying = requestAnimationFrame(frame);
}

function offer(server) {
  byId("model").textContent = `The model here is ${server.model}.`;
  byId("block_size").value = server.block_size;
  known = server.modes;
  const boxes = known.map((mode) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = mode.name;
    box.checked = SHOWN_AT_FIRST.includes(mode.name);
    label.title = plain(mode.summary);
    label.append(box, mode.name);
    return label;
  });
  byId("modes").querySelectorAll("label").forEach((label) => label.remove());
  byId("modes").append(...boxes);
}

async function begin() {
  try {
    offer(await about(byId("key").value));
  } catch (error) {
    return say(error.message, true);
  }
  return say("");
}

byId("legend").append(
  ...Array.from({ length: STEPS_IN_LEGEND }, (_, step) => {
    const item = document.createElement("li");
    item.className = "token";
    item.style.setProperty("--step", step);
    item.textContent = step + 1;
    return item;
  }),
);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("stop").addEventListener("click", () => stopping.abort());
byId("replay").addEventListener("click", replay);
byId("key").addEventListener("change", begin);
document.addEventListener("input", (event) => {
  if (event.target.type === "range") cancelAnimationFrame(replaying); // moving a slider ends the replay
});
begin();
