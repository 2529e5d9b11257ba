"""Rebuilds src/twotower/data/tasks, the tasks of `twotower eval`; always the same bytes.

python recipes/tasks/build.py [DIRECTORY]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import twotower
from twotower.eval.tasks import SHIPPED, Example

STORY_PROMPTS = Path(__file__).parents[2] / "benchmarks" / "stories_prompts.json"

Line = dict[str, Any]


def stories() -> list[Line]:
    """Beginnings that the stories context tower sampled with seeds that no training has used."""
    tokenizer = twotower.load().tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.decode(ids) for ids in json.loads(STORY_PROMPTS.read_text())]
    return [{"prompt": prompt, "scorer": "likelihood", "max_new_tokens": 192} for prompt in prompts]


TASKS = {"stories": stories}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=SHIPPED)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in TASKS.items():
        lines = make()
        for line in lines:
            Example.from_dict(line)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
