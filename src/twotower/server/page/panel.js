// The panel of one mode: keeps all steps that the server sent, and draws the text as it was after any of them.

// A mode's summary without the marks of code in it.
export function plain(summary) {
  return summary.replaceAll("`", "");
}

export class Panel {
  // `mode` is an entry of /twotower/about.
  constructor(mode, prompt, root) {
    this.mode = mode.name;
    this.steps = []; // the objects that the server sent
    this.counts = []; // number of tokens after each step
    this.tokens = []; // {text, step, confidence, pass}; pass is true for the first token that a step gave
    this.result = null;
    this.find = (selector) => root.querySelector(selector);
    this.fixed = []; // the step at which each place of the current block was fixed, null where it is masked
    this.find("h2").textContent = mode.name;
    this.find(".block").hidden = !mode.fills_blocks;
    this.find(".what").textContent = plain(mode.summary);
    this.text = this.find(".text");
    this.text.setAttribute("aria-label", `Text of mode ${mode.name}`);
    this.slider = this.find("input");
    this.slider.setAttribute("aria-label", `Step of mode ${mode.name}`);
    this.slider.addEventListener("input", () => this.show(Number(this.slider.value)));
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = prompt;
    this.text.append(given);
    this.drawn = 0; // number of tokens drawn
    this.open = []; // the spans of the unfinished block behind them
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

  // How many steps had been taken `seconds` after the start.
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

  // The span of one place of the unfinished block: a token fixed at step `fixed`, or a mask.
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

  // The number of denoiser calls (NFE) in words. Each step is one, except in ar; auto mixes both kinds, so until its
  // result says how many calls there were, it shows steps.
  calls(count, tokens, whole) {
    const nfe = whole ? this.result.denoiser_calls : this.mode === "ar" ? 0 : count;
    if (this.mode === "auto" && !whole) return `${count} passes`;
    if (nfe === 0) return "no NFE";
    return tokens === 0 ? `${nfe} NFE` : `${nfe} NFE, ${(tokens / nfe).toFixed(1)} tokens each`;
  }
}
