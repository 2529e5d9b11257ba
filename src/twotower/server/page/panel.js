// One mode's text: every step that came, and the view of any of them.

const ABOUT = {
  ar: "the context tower alone, one token a pass",
  diffusion: "whole blocks, the surest places first",
  verified: "drafted blocks that the context tower checks: the text of ar",
  simulated_ar: "blocks from left to right",
  mock_ar: "the denoiser as a second autoregressive model",
};

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
    this.find("h2").textContent = mode;
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
    const speed = this.find(".speed");
    speed.classList.add("bad");
    speed.textContent = message;
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
      this.text.append(this.span(this.tokens[this.drawn], ["ar", "verified"].includes(this.mode)));
      this.drawn += 1;
    }
    const places = step?.block?.places ?? [];
    this.open = places.map((place) => this.place(place, count));
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

  // A place of the unfinished block; the step at which it was fixed is the first that shows it.
  place(place, count) {
    if (place === null) {
      const span = document.createElement("span");
      span.className = "token mask";
      span.textContent = " ▒▒";
      span.setAttribute("aria-hidden", "true");
      return span;
    }
    const span = this.span({ ...place, step: this.steps[count - 1].block.step - 1 }, false);
    span.classList.add("open");
    return span;
  }

  drawBlock(block) {
    const cells = (block?.places ?? []).map((place) => {
      const cell = document.createElement("li");
      const piece = document.createElement("span");
      const sure = document.createElement("span");
      piece.className = "piece";
      sure.className = "sure";
      piece.textContent = place === null ? "masked" : (place.text ?? "·").trim() || "␣";
      sure.textContent = place === null ? "" : place.confidence.toFixed(2);
      cell.className = place === null ? "masked" : "";
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
    const nfe = this.mode === "ar" ? 0 : count;
    const whole = this.result !== null && count === total;
    const seconds = whole ? this.result.seconds_total : step?.seconds ?? 0;
    const speed = document.createElement("b");
    speed.textContent = seconds > 0 ? (tokens / seconds).toFixed(0) : "0";
    const rest = nfe ? `${nfe} NFE, ${(tokens / nfe).toFixed(2)} tokens per NFE` : "no NFE";
    this.find(".speed").replaceChildren(speed, ` tokens/s · ${tokens} tokens in ${seconds.toFixed(2)} s · ${rest}`);
  }
}
