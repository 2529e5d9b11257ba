"""Writes the hybrid's texts, tokenizer and questions; README.md beside this file has the commands around it.

    python recipes/hybrid/build.py PACKAGES OUT [--documents 100000]

PACKAGES is a directory with the Debian packages of README.md unpacked. Into OUT it writes:

- `text.jsonl`, to pretrain on,
- `answers.jsonl`, for the denoiser, whose records have a prompt that is not learnt,
- `held_out_answers.jsonl`, with questions that are not in `answers.jsonl`,
- `other/`, task files with questions to choose settings by, which are none of those that come with the package,
- `tokenizer.json`.

The training texts contain no question of `other/`, nor of the tasks that come with the package.
"""

import argparse
import html
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from twotower.eval.tasks import SHIPPED

VOCABULARY = 1024
SPECIAL = ["<unk>", "<s>", "</s>", "<mask>"]
# End tokens after an answer: the block of a short answer goes on behind it, and the denoiser must fill all its places
ENDS = 15
SHARES = {"lists": 26, "json": 12, "extraction": 15, "functions": 15, "sums": 14, "appointments": 16}
ENGLISH_SHARE = 2
ANSWER_SHARES = {"lists": 37, "json": 5, "extraction": 10, "functions": 10, "sums": 24, "appointments": 14}

Line = dict[str, Any]


class Document(NamedTuple):
    """A prompt of one or several questions, of which all but the last are answered, and the last one's answer."""

    prompt: str
    answer: str


def tasks_recipe() -> ModuleType:
    """recipes/tasks/build.py, whose functions write lines like those of the tasks that come with the package."""
    file = Path(__file__).parents[1] / "tasks" / "build.py"
    spec = importlib.util.spec_from_file_location("tasks_recipe", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TASKS = tasks_recipe()


# How many lines at the end of a prompt are the question itself; in other tasks it is the whole prompt.
QUESTION_LINES = {"lists": 1, "json": 2}
# Tasks whose questions need the whole prompt, and have it for themselves
ALONE = {"appointments"}


def question(task: str, prompt: str) -> str:
    """The question of a prompt, without the examples before it."""
    count = QUESTION_LINES.get(task)
    return prompt if count is None else "\n".join(prompt.split("\n")[-count:])


def documents(task: str, seed: int, banned: set[str], most: int = 1) -> Iterator[Document]:
    """Endless documents of a task, with up to `most` questions each, or one if the task is in ALONE."""
    draw = random.Random(f"{task} of hybrid {seed}")
    while True:
        lines = [line for line in TASKS.TASKS[task](draw) if question(task, line["prompt"]) not in banned]
        draw.shuffle(lines)
        while lines:
            count = 1 if task in ALONE else min(len(lines), most, draw.choice((1, 2, 4, 8)))
            taken = [lines.pop() for _ in range(count)]
            prompts = [taken[0]["prompt"], *(question(task, line["prompt"]) for line in taken[1:])]
            answers = [written(line) for line in taken]
            done = "".join(p + a for p, a in zip(prompts[:-1], answers[:-1], strict=True))
            yield Document(done + prompts[-1], answers[-1])


def written(line: Line) -> str:
    """A line's answer as it follows the prompt, up to the first of its stop strings."""
    return ("" if line["prompt"].endswith("\n") else " ") + line["answer"] + line["stop"][0]


def english(packages: Path) -> Iterator[Document]:
    """Paragraphs of Python's documentation and Debian's handbook, and WordNet's definitions."""
    share = packages / "usr/share"
    for file in sorted((share / "doc").rglob("*.rst.txt")):
        yield from paragraphs(file.read_text())
    for file in sorted((share / "doc/debian-handbook/html/en-US").glob("*.html")):
        yield from paragraphs(html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</p>", "\n\n", file.read_text()))))
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (share / f"wordnet/data.{kind}").read_text().splitlines():
            if not line.startswith(" "):
                yield Document("", f"{line.split()[4].replace('_', ' ')}: {line.split('|')[1].strip()}\n")


def paragraphs(text: str) -> Iterator[Document]:
    """The paragraphs of a text that look like sentences, not like markup."""
    for part in re.split(r"\n\s*\n", text):
        plain = " ".join(part.split())
        if 80 < len(plain) < 1200 and plain[0].isupper() and plain.endswith(".") and plain.isascii():
            yield Document("", plain + "\n")


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE in which every digit is a token, so that sums can be learnt; BOS before every prompt."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write(path: Path, records: list[Line]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=100000, help="how many to write in all")
    a = parser.parse_args()
    (a.out / "other").mkdir(parents=True, exist_ok=True)

    text: list[Document] = []
    answers: list[Document] = []
    unseen: list[Document] = []
    for task in SHARES:
        shipped = [json.loads(line) for line in (SHIPPED / f"{task}.jsonl").read_text().splitlines()]
        banned = {question(task, line["prompt"]) for line in shipped}
        draw = random.Random(f"{task}, other questions")
        other = [line for line in TASKS.TASKS[task](draw) if question(task, line["prompt"]) not in banned]
        write(a.out / "other" / f"{task}.jsonl", other)
        banned |= {question(task, line["prompt"]) for line in other}
        own = list(islice(documents(task, 2, banned), ANSWER_SHARES[task] * 3))
        banned |= {question(task, document.prompt) for document in own}
        unseen += own
        text += islice(documents(task, 0, banned, most=8), a.documents * SHARES[task] // 100)
        answers += islice(documents(task, 1, banned), a.documents * ANSWER_SHARES[task] // 100)
    plain = list(english(a.packages))
    random.Random(0).shuffle(plain)
    text += plain[: a.documents * ENGLISH_SHARE // 100]
    for seed, part in enumerate((text, answers, unseen)):
        random.Random(seed).shuffle(part)

    end = SPECIAL[2] * ENDS
    write(a.out / "text.jsonl", [{"text": d.prompt + d.answer} for d in text])
    for name, part in (("answers", answers), ("held_out_answers", unseen)):
        write(a.out / f"{name}.jsonl", [{"prompt": d.prompt, "text": d.answer + end} for d in part])
    train_tokenizer([d.prompt + d.answer for d in text]).save(str(a.out / "tokenizer.json"))


if __name__ == "__main__":
    main()
