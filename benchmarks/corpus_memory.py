"""Peak memory and speed of `twotower tokenize` for texts of several sizes, as JSON lines.

    python benchmarks/corpus_memory.py > benchmarks/results/corpus_memory.jsonl

A text is made in a temporary folder: stories of random words, in one .txt file, which is one document, or as records of
a .jsonl file; `jsonl-line` is a .jsonl file with one record of the whole size. `base_mib` is what the same command
takes for a text of a few words: Python, torch and the tokenizer.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WORDS = "the a fox river sang found new song little every day who lived near once upon time there was she liked to"
KINDS = ("txt", "jsonl", "jsonl-line")


def stories(size: int) -> Iterator[str]:
    """Stories of about a thousand characters, `size` bytes together."""
    rng = random.Random(0)
    ready = [" ".join(rng.choices(WORDS.split(), k=rng.randint(20, 400))).capitalize() + ".\n" for _ in range(2000)]
    while size > 0:
        story = rng.choice(ready)[:size]
        size -= len(story)
        yield story


def write(file: Path, kind: str, size: int) -> None:
    with file.open("w", encoding="utf-8") as opened:
        if kind == "jsonl-line":
            opened.write('{"text": "')
        for story in stories(size):
            if kind == "jsonl":
                story = json.dumps({"text": story}) + "\n"
            elif kind == "jsonl-line":
                story = json.dumps(story)[1:-1]
            opened.write(story)
        if kind == "jsonl-line":
            opened.write('"}\n')


def measure(model: str, file: Path, out: Path) -> dict[str, float]:
    """Runs the command in a process of its own, whose memory a small process between reports."""
    watched = (
        "import json, resource, subprocess, sys\n"
        "found = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024\n"
        "print(json.dumps([peak, found.returncode, found.stderr]))"
    )
    command = [sys.executable, "-m", "twotower", "tokenize", model, str(file), str(out), "--length", "256"]
    began = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", watched, *command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    peak, code, errors = json.loads(ran.stdout)
    if code:
        raise RuntimeError(errors)
    num_tokens = sum(shard.stat().st_size for shard in out.iterdir()) / 9  # 4 bytes for each id, 1 and 4 beside it
    return {"peak_mib": round(peak), "seconds": round(seconds, 1), "tokens": round(num_tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 500, 2000])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=["txt", "jsonl"])
    parser.add_argument("--model", default="stories")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "base.txt")
        file.write_text("Once upon a time.", encoding="utf-8")
        base = measure(chosen.model, file, Path(folder, "base"))
        for megabytes in chosen.megabytes:
            for kind in chosen.kinds:
                file = Path(folder, f"{megabytes}-{kind}").with_suffix(f".{kind.split('-')[0]}")
                out = Path(folder, f"out-{megabytes}-{kind}")
                write(file, kind, megabytes * 1_000_000)
                found = measure(chosen.model, file, out)
                working = found["seconds"] - base["seconds"]
                row = {
                    "kind": kind,
                    "megabytes": megabytes,
                    "base_mib": base["peak_mib"],
                    **found,
                    "tokens_per_second": round(found["tokens"] / working),
                }
                print(json.dumps(row), flush=True)
                file.unlink()
                for shard in out.iterdir():
                    shard.unlink()


if __name__ == "__main__":
    main()
