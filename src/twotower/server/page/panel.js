// One mode's text: every step that came, and the view of any of them.

const ABOUT = {
  ar: "the context tower alone, token by token",
  diffusion: "whole blocks, the surest places first",
  verified: "drafts that the context tower checks",
  simulated_ar: "blocks from left to right",
  mock_ar: "the denoiser as a second ar model",
  auto: "ar or verified, whichever is faster now",
};
const WITH_BLOCKS = ["diffusion", "simulated_ar"];

export function describe(mode) {
  return ABOUT[mode] ?? "";
}

export class Panel {
  constructor(mode, prompt, root) {
    this.mode = mode;
    this.steps = []; // as the server sent them
    this.counts = []; // tokens after each
    this.tokens = []; // {text, step, confidence, pass}: pass is whether a pass began with it
    this.result = null;
    this.find = (selector) => root.querySelector(selector);
    this.fixed = []; // the step at which each place of the present block was fixed, null where it is masked
    this.find("h2").textContent = mode;
    this.find(".block").hidden = !WITH_BLOCKS.includes(mode);
    this.find(".what").textContent = describe(mode);
    this.text = this.find(".text");
    this.text.setAttribute("aria-label", `Text of mode ${mode}`);
    this.slider = this.find("input");
    this.slider.setAttribute("aria-label", `Step of mode ${mode}`);
    this.slider.addEventListener("input", () => this.show(Number(this.slider.value)));
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = prompt;
    this.text.append(given);
    this.drawn = 0; // tokens in the text
    this.open = []; // the block's spans behind them
    this.pending = false;
  }

  take(step) {
    step.tokens.forEach((token, i) => this.tokens.push({ ...token, pass: i === 0 }));
    if (step.block) {
      const before = step.block.step === 1 ? [] : this.fixed;
      const now = step.block.step - 1;
      this.fixed = step.block.places.map((place, i) => (place === null ? null : before[i] ?? now));
      step.block.fixed = this.fixed;
    }
    this.steps.push(step);
    this.counts.push(this.tokens.length);
    this.result = step.result ?? null;
    if (!this.pending) {
      this.pending = true;
      requestAnimationFrame(() => {
        this.pending = false;
        this.show(this.steps.length);
      });
    }
  }

  fail(message) {
    this.find(".failure").textContent = message;
  }

  get seconds() {
    return this.steps.length ? this.steps[this.steps.length - 1].seconds : 0;
  }

  // The number of steps that had been taken after so many seconds.
  stepsAt(seconds) {
    const later = this.steps.findIndex((step) => step.seconds > seconds);
    return later < 0 ? this.steps.length : later;
  }

  // Draws the text as it was after `count` steps.
  show(count) {
    const step = count > 0 ? this.steps[count - 1] : null;
    const wanted = count > 0 ? this.counts[count - 1] : 0;
    this.open.forEach((span) => span.remove());
    while (this.drawn > wanted) {
      this.text.lastChild.remove();
      this.drawn -= 1;
    }
    while (this.drawn < wanted) {
      this.text.append(this.span(this.tokens[this.drawn], this.mode === "verified"));
      this.drawn += 1;
    }
    const places = step?.block?.places ?? [];
    this.open = places.map((place, i) => this.place(place, step.block.fixed[i]));
    this.text.append(...this.open);
    this.text.scrollTop = this.text.scrollHeight;
    this.drawBlock(step?.block);
    this.drawNumbers(step, count, wanted);
  }

  span(token, marksPasses) {
    const span = document.createElement("span");
    span.className = marksPasses && token.pass ? "token pass" : "token";
    span.style.setProperty("--step", token.step);
    span.textContent = token.text ?? "·";
    span.title = `step ${token.step + 1}, probability ${token.confidence.toFixed(2)}`;
    return span;
  }

  // A place of the unfinished block, fixed at a step or masked.
  place(place, fixed) {
    if (place === null) {
      const span = document.createElement("span");
      span.className = "token mask";
      span.textContent = " ▒▒";
      span.setAttribute("aria-hidden", "true");
      return span;
    }
    const span = this.span({ ...place, step: fixed }, false);
    span.classList.add("open");
    return span;
  }

  drawBlock(block) {
    const cells = (block?.places ?? []).map((place, i) => {
      const cell = document.createElement("li");
      const piece = document.createElement("span");
      const sure = document.createElement("span");
      piece.className = "piece";
      sure.className = "sure";
      piece.textContent = place === null ? "masked" : (place.text ?? "·").trim() || "␣";
      sure.textContent = place === null ? "" : place.confidence.toFixed(2);
      cell.className = place === null ? "masked" : "token";
      cell.style.setProperty("--step", block.fixed[i] ?? 0);
      cell.append(piece, sure);
      if (place !== null) {
        const bar = document.createElement("span");
        bar.className = "bar";
        bar.style.setProperty("--sure", place.confidence);
        cell.append(bar);
      }
      return cell;
    });
    this.find(".block").replaceChildren(...cells);
  }

  drawNumbers(step, count, tokens) {
    const total = this.steps.length;
    this.slider.max = total;
    this.slider.value = count;
    this.slider.disabled = total === 0;
    const masked = step?.block ? step.block.places.filter((place) => place === null).length : 0;
    const left = step?.block ? `, ${masked} of ${step.block.places.length} places masked` : "";
    const words = `Step ${count} of ${total}${left}`;
    this.find(".at").textContent = words;
    this.slider.setAttribute("aria-valuetext", words);
    const whole = this.result !== null && count === total;
    const seconds = whole ? this.result.seconds_total : step?.seconds ?? 0;
    const speed = document.createElement("b");
    speed.textContent = seconds > 0 ? (tokens / seconds).toFixed(0) : "0";
    const counts = document.createElement("span");
    counts.textContent = `${tokens} tokens in ${seconds.toFixed(2)} s, ${this.calls(count, tokens, whole)}`;
    this.find(".speed").replaceChildren(speed, " tokens/s", counts);
  }

  // What the denoiser did for it: each step but those of ar is one NFE, and auto takes both kinds.
  calls(count, tokens, whole) {
    const nfe = whole ? this.result.denoiser_calls : this.mode === "ar" ? 0 : count;
    if (this.mode === "auto" && !whole) return `${count} passes`;
    if (nfe === 0) return "no NFE";
    return tokens === 0 ? `${nfe} NFE` : `${nfe} NFE, ${(tokens / nfe).toFixed(1)} tokens each`;
  }
}
