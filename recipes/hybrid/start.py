"""Gives a checkpoint another tokenizer, so that training can go on with it on other texts.

    python recipes/hybrid/start.py CHECKPOINT TOKENIZER.json OUT

A token that both vocabularies have keeps its rows in embeddings and heads. A new token's row is the mean of those of
the old tokens that its text is made of.
"""

import argparse
from pathlib import Path

import tokenizers
import torch

import twotower
from twotower.checkpoints.hf import save


def sources(old: tokenizers.Tokenizer, new: tokenizers.Tokenizer) -> list[list[int]]:
    """For each token of `new`, the tokens of `old` that it stands for: itself, or the pieces of its text."""
    known, found = old.get_vocab(), []
    for token in sorted(new.get_vocab(), key=new.get_vocab().__getitem__):
        pieces = [known[token]] if token in known else old.encode(new.decoder.decode([token])).ids[1:]
        found.append(pieces or [0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    model = twotower.load(a.checkpoint, dtype="float32", pack=False)
    assert model.tokenizer is not None
    new = tokenizers.Tokenizer.from_file(str(a.tokenizer))
    size = model.config.vocab_size
    if new.get_vocab_size() != size:
        raise SystemExit(f"{a.tokenizer} has {new.get_vocab_size()} tokens, must have {size}, as {a.checkpoint} has")
    rows = sources(model.tokenizer, new)
    changed = 0
    for tensor in model.released_tensors().values():
        if tensor.shape[:1] == (size,):
            tensor.copy_(torch.stack([tensor[pieces].mean(0) for pieces in rows]))
            changed += 1
    model.tokenizer = new
    save(model, a.out)
    print(f"wrote {a.out}: {changed} tensors with the rows of {sum(len(p) == 1 for p in rows)} tokens kept")


if __name__ == "__main__":
    main()
