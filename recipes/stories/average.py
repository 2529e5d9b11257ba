"""Averages the weights of checkpoints that go on from one another, tensor by tensor.

    python recipes/stories/average.py OUT CHECKPOINT CHECKPOINT...

OUT gets the other files of the first one. Two ends of training that began at the same weights lie in one valley of the
loss, and the point between them is often below both (model soups, https://arxiv.org/abs/2203.05482).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders with one model.safetensors each")
    a = parser.parse_args()
    if a.out.exists():
        parser.error(f"OUT is {a.out}, must be a folder that doesn't exist yet; choose another, or remove it")
    if len(a.checkpoints) < 2:
        parser.error(f"{len(a.checkpoints)} checkpoint, must be at least 2 to average")
    files = [folder / "model.safetensors" for folder in a.checkpoints]
    for file in files:
        if not file.exists():
            parser.error(f"{file} doesn't exist; give folders that hold one model.safetensors each")
    tensors = [load_file(file) for file in files]
    names = set(tensors[0])
    for file, own in zip(files, tensors, strict=True):
        if set(own) != names:
            parser.error(f"{file} has other tensors than {files[0]}: {sorted(set(own) ^ names)[:3]}")
    shutil.copytree(a.checkpoints[0], a.out)
    average = {
        name: torch.stack([own[name].float() for own in tensors]).mean(0).to(first.dtype)
        for name, first in tensors[0].items()
    }
    with safe_open(files[0], "pt") as file:
        save_file(average, a.out / "model.safetensors", metadata=file.metadata())
    print(json.dumps({"out": str(a.out), "checkpoints": len(files), "tensors": len(names)}))


if __name__ == "__main__":
    main()
