"""Measures what each part of the recipe is worth, by training denoisers for one backbone with and without it.

    python benchmarks/ablations.py START CORPUS HELD_OUT RUNS.jsonl --steps 100 > benchmarks/results/ablations.json

START is a checkpoint of two equal towers (from `twotower init`). CORPUS and HELD_OUT are shards of `twotower tokenize`
with a prompt field, so that the scored tokens of a document are an answer. Every variant starts from the same weights
and sees the same rows with the same noise. Each run adds a line to RUNS.jsonl. Runs that are already there are not made
again, and a file with runs of other settings, weights or rows is refused. Prints one JSON line: for each variant the
mean over seeds with its 95 % t-interval, and the same for its difference from `base`, taken seed by seed.

Variants:

- `tied` has one tower that is both, trained with the context tower's loss too. `joint` has two towers that are both
  trained, with that loss too; it tells the effect of sharing from that of further training.
- `unseeded` hides from a block everything before it.
- `untimed` always passes t = 1.
- `curriculum` has blocks of 32 for two thirds of the steps.
- `distilled` adds the divergence from the context tower's distribution.

Measures, on held-out answers whose blocks start where the answer does, as in decoding, with the earlier blocks given:

- `loss`: of wholly masked blocks, nats per token.
- `drafted_right`: the share of positions that the first draft gets right with no error before them in the block.
- `right` and `passes`: when decoding by confidence at γ, the share of answers that come out right and the passes per
  block. An answer is judged up to its end, and left out if the row may cut that off.
- `ar_right`: the share of answers that the context tower gets right greedily; only `tied` and `joint` can change it.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import twotower
from twotower.checkpoints.hf import resolve
from twotower.config import TwoTowerConfig
from twotower.eval.provenance import provenance
from twotower.model.two_tower import TwoTower
from twotower.training.config import DenoisingConfig, Phase, Share
from twotower.training.corpus.shards import Corpus, CorpusBatch
from twotower.training.forward.block_parallel import block_parallel_hidden
from twotower.training.forward.layout import Layout, make_layout
from twotower.training.masks.noise import Corrupted
from twotower.training.objectives.denoising import Denoising, NoisyRows
from twotower.training.run.trainer import TrainConfig, Trainer

# Two-sided 95 % quantiles of Student's t by degrees of freedom, which are one less than the seeds
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
THRESHOLD = 0.8  # γ
HELD_OUT = 16  # rows
Change = Callable[[Corrupted], Corrupted]


def unseeded(noisy: Corrupted) -> Corrupted:
    """The rows with every block as a document of its own, so that no key or state reaches the next block."""
    return noisy._replace(layout=Layout(noisy.layout.block, noisy.layout.block))


def untimed(noisy: Corrupted) -> Corrupted:
    """The rows with t = 1 as the level that the denoiser is told."""
    return noisy._replace(told=torch.ones_like(noisy.told))


class Variant(NamedTuple):
    """Settings that differ from the base's, and a change of every row that is trained on or measured."""

    settings: dict[str, Any]
    change: Change = lambda noisy: noisy


def variants(steps: int) -> dict[str, Variant]:
    """All variants by name, for runs of `steps` steps."""
    return {
        "base": Variant({}),
        "tied": Variant({"context": "tied", "ar_weight": 1.0}),
        "joint": Variant({"context": "trained", "ar_weight": 1.0}),
        "unseeded": Variant({}, unseeded),
        "untimed": Variant({}, untimed),
        "curriculum": Variant({"phases": (Phase(0, 32), Phase(2 * steps // 3, 16))}),
        "distilled": Variant({"objective": (Share("cross_entropy", 1.0), Share("distillation", 1.0))}),
    }


class Ablated(Denoising):
    """The denoising objective on rows that a variant changes."""

    def __init__(self, model: TwoTower, variant: Variant) -> None:
        super().__init__(model, DenoisingConfig(**variant.settings))
        self.change = variant.change

    def prepare(self, batch: CorpusBatch, step: int, seed: int, device: torch.device) -> NoisyRows:
        rows = super().prepare(batch, step, seed, device)
        return rows._replace(noisy=self.change(rows.noisy))


class Answers(NamedTuple):
    """Held-out rows and their layout in blocks.

    `judged` (b, t) bool marks the positions of answers up to their ends, in documents that are wholly in the row.
    `number` (b, t) is the answer that a position belongs to, numbered over all rows.
    """

    rows: CorpusBatch
    layout: Layout
    judged: Tensor
    number: Tensor


def answers(rows: CorpusBatch, config: TwoTowerConfig) -> Answers:
    """Finds the answers in held-out rows."""
    part = rows.document * 2 + rows.scored  # numbers a document's prompt, then its answer
    layout = Layout(make_layout(part, config.block_size).block, rows.document)
    starts = layout.document_start
    ends = (rows.ids == config.eos_token_ids[0]) & rows.scored
    before = ends.long().cumsum(1) - ends.long()  # how many ends are before each position in its row
    after_end = before - before.gather(1, starts)  # and of these in its document
    last = rows.document == rows.document[:, -1:]  # the end of the row may cut it off
    whole = (rows.ids.gather(1, starts) == config.bos_token_id) & ~last
    number = rows.document + torch.arange(len(rows.ids))[:, None] * (int(rows.document.max()) + 1)
    return Answers(rows, layout, rows.scored & whole & (after_end == 0), number)


def share_right(wrong: Tensor, held_out: Answers) -> float:
    """The share of answers without a judged position that is wrong (b, t) bool."""
    failed = held_out.number[held_out.judged & wrong].unique()
    return 1 - len(failed) / len(held_out.number[held_out.judged].unique())


@torch.inference_mode()
def measure(model: TwoTower, held_out: Answers, change: Change, threshold: float) -> dict[str, float]:
    """All measures of a model, as the module describes them."""
    rows, layout = held_out.rows, held_out.layout
    ids, mask = rows.ids, model.config.mask_token_id
    masked, passes = rows.scored.clone(), torch.zeros_like(layout.block)
    block = layout.block + torch.arange(len(ids))[:, None] * (int(layout.block.max()) + 1)  # numbered over all rows
    xt = ids.masked_fill(masked, mask)
    scored = per_block(rows.scored.float(), block)
    out: dict[str, float] = {}
    while bool(masked.any()):
        left = masked.any(1) if out else torch.ones(len(ids), dtype=torch.bool)  # (b,); the first pass has all rows
        level = (per_block(masked.float(), block) / scored.clamp(min=1))[left]
        where = Layout(layout.block[left], layout.document[left])
        noisy = change(Corrupted(xt[left], masked[left], level, level, rows.scored[left], where))
        hidden = block_parallel_hidden(model, ids[left], noisy.xt, noisy.told, noisy.layout)
        logits = model.lm_head(hidden.denoiser[noisy.masked])
        logits[:, mask] = -torch.inf
        sure, token = (
            torch.zeros(ids.shape, dtype=d).masked_scatter(masked, v)
            for d, v in zip((torch.float32, torch.int64), logits.softmax(-1).max(-1), strict=True)
        )
        if not out:
            judged = held_out.judged[masked]
            out["loss"] = float(F.cross_entropy(logits[judged], ids[masked][judged]))
            out["drafted_right"] = leading(token == ids, held_out)
            # Measured on the unchanged rows, whatever the variant changes for the denoiser
            context = block_parallel_hidden(model, ids, xt, level, layout, with_context=True).context
            assert context is not None
            following = model.context_lm_head(context).argmax(-1).roll(1, dims=1)
            out["ar_right"] = share_right(following != ids, held_out)
        commit = masked & ((sure > threshold) | (sure == per_block(sure, block, "amax")))
        passes += per_block(masked.float(), block) > 0
        xt, masked = torch.where(commit, token, xt), masked & ~commit
    first = (layout.block_start == torch.arange(ids.shape[1])) & rows.scored
    return out | {"right": share_right(xt != ids, held_out), "passes": float(passes[first].double().mean())}


def per_block(values: Tensor, block: Tensor, reduce: str = "sum") -> Tensor:
    """(b, t): the sum (or amax) of values (b, t) over each position's block; `block` numbers blocks over all rows."""
    found = values.new_zeros(int(block.max()) + 1).scatter_reduce(0, block.flatten(), values.flatten(), reduce)
    return found[block]


def leading(right: Tensor, held_out: Answers) -> float:
    """The share of judged positions that are right, and so is everything before them in their block."""
    errors = (~right).long()
    so_far = errors.cumsum(1)
    before_block = (so_far - errors).gather(1, held_out.layout.block_start)
    return float((so_far == before_block)[held_out.judged].double().mean())


def run(a: argparse.Namespace, corpus: Corpus, held_out: Answers, name: str, seed: int) -> dict[str, float]:
    """Trains one variant and measures it."""
    variant = variants(a.steps)[name]
    model = twotower.load(a.start, dtype=torch.float32, pack=False)
    config = TrainConfig(
        steps=a.steps,
        batch_size=a.batch_size,
        learning_rate=a.learning_rate,
        warmup_steps=a.steps // 10,
        decay_steps=a.steps // 2,
        checkpoint_every=a.steps,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        Trainer(Ablated(model, variant), corpus, config, folder).run(lambda report: None)
    return measure(model.eval(), held_out, variant.change, THRESHOLD)


def summary(values: list[float]) -> dict[str, float | None]:
    """The mean and the half-width of its 95 % t-interval, which is None for a single value."""
    n = len(values)
    half = T_95[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": statistics.mean(values), "half_width_95": half}


def summaries(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each variant its measures, and their differences from the base's with the same seed."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for line in runs:
        found.setdefault(line["variant"], {})[line["seed"]] = line["measures"]
    base = found["base"]
    return {
        name: {
            "values": {m: summary([own[m] for own in seeds.values()]) for m in base[0]},
            "minus_base": {m: summary([own[m] - base[seed][m] for seed, own in seeds.items()]) for m in base[0]},
        }
        for name, seeds in found.items()
    }


def fingerprint(folder: Path) -> str:
    """A hash of the contents of a checkpoint or corpus, the same wherever it lies."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        with path.open("rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def settings(a: argparse.Namespace) -> dict[str, Any]:
    """What two runs of a variant and seed must share to be the same run."""
    chosen = {name: getattr(a, name) for name in ("steps", "batch_size", "learning_rate")}
    data = {"start": resolve(a.start), "corpus": a.corpus, "held_out": a.held_out}
    measured = {"threshold": THRESHOLD, "held_out_rows": HELD_OUT}
    return chosen | measured | {f"{name}_sha256": fingerprint(folder) for name, folder in data.items()}


def runs_of(file: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs in a file, none if it is missing. Raises ValueError if one has other settings."""
    runs: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for number, line in enumerate(runs, start=1):
        names = line["settings"].keys() | wanted.keys()
        other = [name for name in sorted(names) if line["settings"].get(name) != wanted.get(name)]
        if other:
            raise ValueError(
                f"{file} line {number} is a run with {other[0]} {line['settings'].get(other[0])}, not "
                f"{wanted.get(other[0])}; give what it was made with, or another file"
            )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(T_95) + 2))
    a = parser.parse_args()
    start = twotower.load(a.start, pack=False)
    corpus, held = (Corpus(folder, vocab_size=start.config.vocab_size) for folder in (a.corpus, a.held_out))
    held_out = answers(held.batch(range(min(HELD_OUT, len(held))), 0), start.config)
    wanted = settings(a)
    runs = [made for made in runs_of(a.runs, wanted) if made["seed"] < a.seeds]
    done = {(line["variant"], line["seed"]) for line in runs}
    for seed in range(a.seeds):  # seed by seed, so that after a kill all variants have the same seeds
        for name in variants(a.steps):
            if (name, seed) not in done:
                made = {"variant": name, "seed": seed, "settings": wanted}
                runs.append(made | {"measures": run(a, corpus, held_out, name, seed)})
                with a.runs.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    sizes = {
        "tokens_per_run": a.steps * a.batch_size * corpus.length,
        "answers": len(held_out.number[held_out.judged].unique()),
    }
    shared = {"benchmark": "ablations", **wanted, "seeds": a.seeds, **sizes}
    print(json.dumps(shared | {"variants": summaries(runs)} | provenance(start)))


if __name__ == "__main__":
    main()
