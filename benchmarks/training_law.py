"""How a denoiser's loss and its tokens per NFE fall and rise with the tokens that it was trained on, and the law of it.

    python benchmarks/training_law.py HELD_OUT 4.9e6=FIRST 13.5e6=SECOND CHECKPOINT... [--plot law.png]

Each argument is TOKENS=CHECKPOINT: how many tokens the checkpoint's denoiser has seen in its life. HELD_OUT are shards
of `twotower sample` or `tokenize` that none was trained on. Prints one JSON line. For each checkpoint:

- `loss`: the likelihood bound of the held-out rows in nats per token, the same noise for all.
- `tokens_per_nfe`, `tokens_per_pass`: of `diffusion` at γ, greedily, from the first tokens of held-out rows to the
  text's end; `tokens_per_nfe` counts the denoiser's passes and `tokens_per_pass` those of both towers.

`law` is loss(n) = floor + scale · n^−exponent, by least squares of all checkpoints (Hoffmann et al. 2022 have this form
for one size of model), and `forecast` what it says of --forecast tokens. It needs three checkpoints, and with three it
goes through all of them. `forecast_range` is the least and the largest forecast of the laws that leave one of them out,
null where only three are left: how far the points agree, not an interval. Tokens per NFE are forecast by their straight
line over the loss.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import twotower
from twotower.eval.provenance import provenance
from twotower.training.config import DenoisingConfig
from twotower.training.corpus.shards import Corpus
from twotower.training.objectives.denoising import Denoising

PROMPT = 32  # tokens
ROWS = 16  # measured and decoded together


class Law(NamedTuple):
    """loss(n) = floor + scale · n^−exponent, in nats and tokens."""

    floor: float
    scale: float
    exponent: float

    def at(self, tokens: float) -> float:
        """The loss after so many tokens."""
        return self.floor + self.scale * tokens**-self.exponent


def fitted(tokens: Sequence[float], losses: Sequence[float]) -> Law:
    """The law of at least three points by least squares: for each floor below the losses a line through their
    logarithms, of these the one nearest to the losses."""
    if len(tokens) < 3:
        raise ValueError(f"{len(tokens)} checkpoints, must be at least 3 for a law of three numbers; give more of them")
    n, y = np.log(np.array(tokens)), np.array(losses)
    best, least = None, math.inf
    for floor in np.linspace(0, y.min(), 4001)[:-1]:
        slope, height = np.polyfit(n, np.log(y - floor), 1)
        law = Law(float(floor), float(np.exp(height)), float(-slope))
        error = float(((law.floor + law.scale * np.exp(-law.exponent * n) - y) ** 2).sum())
        if error < least:
            best, least = law, error
    assert best is not None
    return best


def measure(checkpoint: str, held: Corpus, threshold: float, questions: int) -> dict[str, float]:
    """The measures of one checkpoint."""
    trained = twotower.load(checkpoint, dtype=torch.float32, pack=False)
    objective = Denoising(trained, DenoisingConfig())
    nats = tokens = 0.0
    for first in range(0, len(held), ROWS):
        batch = held.batch(range(first, min(first + ROWS, len(held))), 0)
        measured = objective.measure(batch, 0, torch.device("cpu"))["elbo"]
        nats, tokens = nats + float(measured.nats), tokens + float(measured.tokens)
    model = twotower.load(checkpoint)
    rows = held.batch(range(min(questions, len(held))), 0).ids[:, :PROMPT].tolist()
    most = held.length - PROMPT
    params = twotower.SamplingParams(
        mode="diffusion", temperature=0.0, confidence_threshold=threshold, max_new_tokens=most
    )
    found = [g for n in range(0, len(rows), ROWS) for g in twotower.generate(model, rows[n : n + ROWS], params)]
    written = sum(g.stats.num_tokens for g in found)
    nfes, others = (sum(getattr(g.stats, name) for g in found) for name in ("denoiser_calls", "context_calls"))
    return {
        "loss": nats / tokens,
        "tokens_per_nfe": written / nfes,
        "tokens_per_pass": written / (nfes + others - len(found)),  # without the prompt's
    }


def forecast(points: Sequence[dict[str, float]], tokens: float) -> dict[str, object]:
    """The law, what it says of `tokens`, and what the laws without one of the points say."""
    seen, losses = [p["tokens"] for p in points], [p["loss"] for p in points]
    law = fitted(seen, losses)
    fewer = [
        fitted([*seen[:i], *seen[i + 1 :]], [*losses[:i], *losses[i + 1 :]]).at(tokens)
        for i in range(len(points))
        if len(points) > 3
    ]
    slope, height = np.polyfit(losses, [p["tokens_per_nfe"] for p in points], 1)
    return {
        "law": law._asdict(),
        "forecast_tokens": tokens,
        "forecast": law.at(tokens),
        "forecast_range": [min(fewer), max(fewer)] if fewer else None,
        "forecast_tokens_per_nfe": float(height + slope * law.at(tokens)),
    }


def draw(points: Sequence[dict[str, float]], law: Law, tokens: float, file: Path) -> None:
    """The loss with its law, and tokens per NFE, over the tokens of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    loss, pace = figure.subplots(1, 2)
    seen = [p["tokens"] for p in points]
    line = np.geomspace(min(seen) / 1.5, tokens, 100)
    loss.plot(line, [law.at(n) for n in line], label=f"{law.floor:.2f} + {law.scale:.3g} · n^−{law.exponent:.2f}")
    loss.plot(seen, [p["loss"] for p in points], "o", label="held out")
    loss.set_ylabel("likelihood bound, nats per token")
    loss.legend()
    pace.plot(seen, [p["tokens_per_nfe"] for p in points], "o-")
    pace.set_ylabel("tokens per NFE")
    for axes in (loss, pace):
        axes.set_xscale("log")
        axes.set_xlabel("tokens of training")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="TOKENS=CHECKPOINT")
    parser.add_argument("--threshold", type=float, default=0.8, help="γ of `diffusion`")
    parser.add_argument("--questions", type=int, default=48, help="rows whose beginnings are continued")
    parser.add_argument("--forecast", type=float, default=1e9, help="tokens")
    parser.add_argument("--plot", type=Path, help="a PNG file; needs the extra `eval`")
    a = parser.parse_args()
    named = []
    for text in a.checkpoints:
        tokens, found, checkpoint = text.partition("=")
        try:
            seen = float(tokens)
        except ValueError:
            seen = 0.0
        if not found or not 0 < seen < math.inf:
            parser.error(
                f"{text!r}, must be TOKENS=CHECKPOINT with tokens above 0, such as 24.6e6=runs/train/checkpoint"
            )
        named.append((seen, checkpoint))
    if len({seen for seen, _ in named}) < 3:
        parser.error(f"{len(named)} checkpoints, must be at least 3 of different tokens: the law has three numbers")
    named.sort()
    last = twotower.load(named[-1][1])
    held = Corpus(a.held_out, vocab_size=last.config.vocab_size)
    points = [{"tokens": n} | measure(name, held, a.threshold, a.questions) for n, name in named]
    told = forecast(points, a.forecast)
    if a.plot is not None:
        draw(points, fitted([p["tokens"] for p in points], [p["loss"] for p in points]), a.forecast, a.plot)
    settings = {"threshold": a.threshold, "questions": a.questions, "held_out_rows": len(held)}
    print(json.dumps({"benchmark": "training_law", **settings, "points": points, **told} | provenance(last)))


if __name__ == "__main__":
    main()
