"""Measures what each objective and kind of masks is worth to a denoiser that is trained already, alone and together.

    python benchmarks/levers.py START CORPUS HELD_OUT RUNS.jsonl --steps 50 > benchmarks/results/levers.json

START is a two-tower checkpoint, CORPUS and HELD_OUT are shards of `twotower tokenize` with a prompt field, so that the
scored tokens of a document are an answer. Every variant trains START on the same rows for the same number of tokens,
then decodes the first questions of HELD_OUT as `ar`, `verified` and `diffusion`, in bfloat16. Each run adds a line to
RUNS.jsonl. Runs that are already there are not made again, and a file with runs of other settings is refused. Prints
one JSON line: for each variant the mean over seeds with its 95 % t-interval, and the same for its difference from
`base`, taken seed by seed. `start` is START itself.

Measures, all counts or likelihoods, none of them a time:

- `verified`: new tokens per pass of either tower; the text is `ar`'s whatever the denoiser is.
- `drafted`: new tokens per round of `verified`.
- `diffusion`: new tokens per pass of either tower at γ; `tokens_per_nfe` per pass of the denoiser.
- `share`: answers of `diffusion` that are the corpus's, as a share of `ar`'s.
- `bytes`: of the checkpoint's weights.
- `loss`: the likelihood bound in nats per token.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from ablations import T_95, fingerprint, runs_of, summaries

import twotower
from twotower.checkpoints.hf import resolve
from twotower.decoding.generate import generate
from twotower.decoding.output import Generation
from twotower.decoding.params import SamplingParams
from twotower.eval.provenance import provenance
from twotower.model.two_tower import TwoTower
from twotower.training.config import DenoisingConfig, TrainConfig, parse_shares
from twotower.training.corpus.shards import Corpus
from twotower.training.held_out import Question, questions
from twotower.training.objectives.denoising import Denoising
from twotower.training.run.trainer import Trainer

LONGEST = 64  # tokens of an answer


class Lever(NamedTuple):
    """A variant: what was expected of it before it was measured, and its settings as recipes name them."""

    expected: str
    settings: Mapping[str, str] = MappingProxyType({})


LEVERS = {
    "base": Lever("the same losses and masks for as many tokens"),
    "drafting": Lever("+0.2 tokens a round of `verified`", {"masks": "noise,drafting"}),
    "prefix": Lever("+0.1 tokens a round", {"masks": "noise,prefix"}),
    "trajectory": Lever("+5 % tokens a pass of `diffusion`", {"masks": "noise,trajectory"}),
    "certainty": Lever("+20 % tokens a pass of `diffusion`, share −0.02", {"objective": "cross_entropy,certainty:0.5"}),
    "consistency": Lever("+5 % tokens a pass of `diffusion`", {"objective": "cross_entropy,consistency"}),
    "distillation": Lever("nothing", {"objective": "cross_entropy,distillation"}),
    "acceptance": Lever(
        "+0.3 tokens a round, of them 0.2 by the masks",
        {"masks": "noise,drafting", "objective": "cross_entropy,acceptance:3"},
    ),
    "together": Lever(
        "+20 % tokens a pass of `diffusion` and +0.3 a round",
        {"masks": "noise,drafting,trajectory", "objective": "cross_entropy,certainty:0.5,acceptance:3"},
    ),
    # chosen once the others had been measured: what gained alone, and nothing else
    "best": Lever(
        "+9 % tokens a pass of `diffusion`, the sum of its two parts",
        {"masks": "noise,trajectory", "objective": "cross_entropy,certainty:0.5"},
    ),
}


def settings_of(name: str, a: argparse.Namespace) -> DenoisingConfig:
    """A variant's settings."""
    chosen: dict[str, Any] = {key: parse_shares(text) for key, text in LEVERS[name].settings.items()}
    return DenoisingConfig(grid=a.grid, full_mask_fraction=a.full_mask_fraction, **chosen)


class Exam(NamedTuple):
    """What is asked of every model: questions, the γ of `diffusion`, texts that end an answer beside its end token, and
    how many of its answers `ar` gets right."""

    asked: list[Question]
    threshold: float
    stop: tuple[str, ...]
    ar_right: int = 0


def decoded(model: TwoTower, exam: Exam, mode: Any) -> list[Generation]:
    """The answers in one mode, greedily, 16 at a time."""
    settings: Any = {"temperature": 0.0, "confidence_threshold": exam.threshold, "stop": exam.stop}
    if mode == "verified":
        settings["drafter"] = "denoiser"
    params = SamplingParams(mode=mode, max_new_tokens=LONGEST, **settings)
    prompts = [question.prompt for question in exam.asked]
    return [f for n in range(0, len(prompts), 16) for f in generate(model, prompts[n : n + 16], params)]


def right(model: TwoTower, found: list[Generation], exam: Exam) -> int:
    """How many answers are the corpus's, without spaces around them."""
    assert model.tokenizer is not None
    wanted = (model.tokenizer.decode(q.answer).strip() for q in exam.asked)
    return sum(f.text is not None and f.text.strip() == text for f, text in zip(found, wanted, strict=True))


def per_pass(found: list[Generation]) -> float:
    """New tokens per pass of either tower; the prompt's pass, which every mode makes, is not counted."""
    passes = sum(f.stats.denoiser_calls + f.stats.context_calls - 1 for f in found)
    return sum(f.stats.num_tokens for f in found) / passes


def measure(folder: Path, exam: Exam) -> dict[str, float]:
    """All measures of a checkpoint but the loss."""
    model = twotower.load(folder)
    drafts, blocks = (decoded(model, exam, mode) for mode in ("verified", "diffusion"))
    tokens, calls = (sum(getattr(f.stats, n) for f in blocks) for n in ("num_tokens", "denoiser_calls"))
    return {
        "verified": per_pass(drafts),
        "drafted": sum(f.stats.num_tokens for f in drafts) / sum(f.stats.denoiser_calls for f in drafts),
        "diffusion": per_pass(blocks),
        "tokens_per_nfe": tokens / calls,
        "bytes": float(sum(file.stat().st_size for file in folder.glob("*.safetensors"))),
        "share": right(model, blocks, exam) / exam.ar_right,
    }


def run(a: argparse.Namespace, corpus: Corpus, held: Corpus, exam: Exam, name: str, seed: int) -> dict[str, float]:
    """Trains one variant and measures it."""
    model = twotower.load(a.start, dtype=torch.float32, pack=False)
    config = TrainConfig(
        steps=a.steps,
        batch_size=a.batch_size,
        learning_rate=a.learning_rate,
        final_learning_rate=a.learning_rate / 100,
        warmup_steps=a.steps // 10,
        decay_steps=a.steps // 2,
        checkpoint_every=a.steps,
        spike_factor=0,
        bf16=True,
        seed=seed,
    )
    objective = Denoising(model, settings_of(name, a))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(objective, corpus, config, Path(folder) / "run").run(lambda report: None)
        measured = objective.measure(held.batch(range(min(16, len(held))), 0), 0, torch.device("cpu"))["elbo"]
        twotower.save(model, Path(folder) / "checkpoint")
        return measure(Path(folder) / "checkpoint", exam) | {"loss": measured.nats / measured.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--grid", default=DenoisingConfig.grid, help="where blocks begin, as `twotower train` has it")
    parser.add_argument("--full-mask-fraction", type=float, default=DenoisingConfig.full_mask_fraction)
    parser.add_argument("--threshold", type=float, default=0.9, help="γ of `diffusion`")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends an answer beside its end token")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(T_95) + 2))
    parser.add_argument("--variants", default=",".join(LEVERS), help="names with commas between them")
    a = parser.parse_args()
    names = a.variants.split(",")
    for name in names:
        if name not in LEVERS:
            parser.error(f"variants is {name!r}, must be one of {', '.join(LEVERS)}")
    if "base" not in names:
        parser.error(f"variants is {a.variants!r}, must have base, which the others are compared with")
    start = twotower.load(a.start)
    corpus, held = (Corpus(folder, vocab_size=start.config.vocab_size) for folder in (a.corpus, a.held_out))
    asked = list(itertools.islice(questions(held, start.config), a.questions))
    exam = Exam(asked, a.threshold, tuple(a.stop))
    exam = exam._replace(ar_right=right(start, decoded(start, exam, "ar"), exam))
    chosen = {
        name: getattr(a, name)
        for name in (
            "steps",
            "batch_size",
            "learning_rate",
            "grid",
            "full_mask_fraction",
            "threshold",
            "questions",
            "stop",
        )
    }
    data = {"start": resolve(a.start), "corpus": a.corpus, "held_out": a.held_out}
    wanted = chosen | {f"{name}_sha256": fingerprint(folder) for name, folder in data.items()}
    runs = [made for made in runs_of(a.runs, wanted) if made["seed"] < a.seeds and made["variant"] in names]
    done = {(line["variant"], line["seed"]) for line in runs}
    for seed, name in itertools.product(range(a.seeds), names):
        if (name, seed) not in done:
            found = run(a, corpus, held, exam, name, seed)
            runs.append({"variant": name, "seed": seed, "settings": wanted, "measures": found})
            with a.runs.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(json.dumps(runs[-1]["measures"] | {"variant": name, "seed": seed}), file=sys.stderr, flush=True)
    sizes = {
        "tokens_per_run": a.steps * a.batch_size * corpus.length,
        "ar_right": exam.ar_right,
        "answers": len(asked),
        "expected": {n: LEVERS[n].expected for n in names},
    }
    untrained = measure(resolve(a.start), exam)
    whole = {"benchmark": "levers", **wanted, "seeds": a.seeds, **sizes, "untrained": untrained}
    print(json.dumps(whole | {"variants": summaries(runs)} | provenance(start)))


if __name__ == "__main__":
    main()
