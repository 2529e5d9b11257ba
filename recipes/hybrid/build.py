"""Writes the hybrid's texts, tokenizer and questions; README.md beside this file has the commands around it.

    python recipes/hybrid/build.py PACKAGES STORIES OUT [--documents 100000]

PACKAGES is a directory with the Debian packages of README.md unpacked, STORIES a corpus that `twotower sample` wrote
with the shipped checkpoint. Into OUT it writes:

- `text.jsonl`, to pretrain on,
- `answers.jsonl`, for the denoiser, whose records have a prompt that is not learnt,
- `held_out_answers.jsonl`, with questions that are not in `answers.jsonl`,
- `tokenizer.json`,
- `sums.jsonl` and `python.jsonl`, questions for `twotower eval`.

The training texts contain no question of the last two, nor of the tasks that come with the package.
"""

import argparse
import html
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import tokenizers
from safetensors.numpy import load_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import twotower
from twotower.eval.tasks import SHIPPED, Example, filled_prompt

VOCABULARY = 1024
SPECIAL = ["<unk>", "<s>", "</s>", "<mask>"]
# End tokens after an answer: the block of a short answer goes on behind it, and the denoiser must fill all its places
ENDS = 15
SHARES = {"lists": 24, "json": 14, "arithmetic": 14, "dialogue": 14, "recall": 10, "sums": 8, "python": 6}
PLAIN_SHARES = {"stories": 6, "english": 4}
# The tasks that this backbone learns to answer in its training; a denoiser can learn no others
ANSWER_SHARES = {"lists": 55, "json": 30, "dialogue": 15}
FUNCTIONS = {
    "the sum of {a} and {b}": "{a} + {b}",
    "the difference of {a} and {b}": "{a} - {b}",
    "the product of {a} and {b}": "{a} * {b}",
    "the larger of {a} and {b}": "max({a}, {b})",
    "the smaller of {a} and {b}": "min({a}, {b})",
    "whether {a} is larger than {b}": "{a} > {b}",
    "whether {a} is equal to {b}": "{a} == {b}",
    "whether {a} is a multiple of {b}": "{a} % {b} == 0",
    "the rest of {a} divided by {b}": "{a} % {b}",
    "twice the sum of {a} and {b}": "2 * ({a} + {b})",
    "the square of {a} plus {b}": "{a} ** 2 + {b}",
    "a list of {a} and {b}": "[{a}, {b}]",
    "a sorted list of {a} and {b}": "sorted([{a}, {b}])",
    "{a} as text followed by {b} as text": "str({a}) + str({b})",
}

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


def sums(draw: random.Random) -> list[Line]:
    """Sums and differences of two numbers below 100, none of them negative."""
    lines = []
    for _ in range(48):
        a, b = draw.randrange(100), draw.randrange(100)
        sign, result = ("+", a + b) if draw.random() < 0.6 or a < b else ("-", a - b)
        lines.append(TASKS.short(f"{a} {sign} {b} =", str(result), "number"))
    return lines


def python(draw: random.Random) -> list[Line]:
    """Functions of one expression, to be written from their docstrings."""
    lines = []
    for _ in range(48):
        what, expression = draw.choice(list(FUNCTIONS.items()))
        a, b = draw.sample("abcdefghkmnpqrstuvwxyz", 2)
        name = draw.choice(TASKS.WORDS)
        prompt = f'def {name}({a}, {b}):\n    """Returns {what.format(a=a, b=b)}."""\n    return'
        answer = expression.format(a=a, b=b)
        values = [(draw.randrange(1, 30), draw.randrange(1, 30)) for _ in range(4)]
        tests = "\n".join(f"assert {name}({x}, {y}) == {eval(answer, {}, {a: x, b: y})!r}" for x, y in values)
        lines.append(TASKS.short(prompt, tests, "program") | {"written": answer})
    return lines


def recall(draw: random.Random) -> list[Line]:
    """The questions of the task `recall`, at distances that fit in a row."""
    lines: list[Line] = TASKS.recall(draw)
    for line in lines:
        line["distance"] = draw.choice((4, 8, 16, 32, 64, 128, 200))
    return lines


MAKERS: dict[str, Callable[[random.Random], list[Line]]] = {
    "lists": TASKS.lists,
    "json": TASKS.to_json,
    "arithmetic": TASKS.arithmetic,
    "dialogue": TASKS.dialogue,
    "recall": recall,
    "sums": sums,
    "python": python,
}
# How many lines at the end of a prompt are the question itself; in other tasks it is the whole prompt.
QUESTION_LINES = {"lists": 1, "json": 2, "arithmetic": 2, "sums": 1}


def question(task: str, prompt: str) -> str:
    """The question of a prompt, without the examples before it."""
    count = QUESTION_LINES.get(task)
    return prompt if count is None else "\n".join(prompt.split("\n")[-count:])


def documents(
    task: str, seed: int, banned: set[str], filler: tokenizers.Tokenizer, most: int = 1
) -> Iterator[Document]:
    """Endless documents of a task, with up to `most` questions each if the task is in QUESTION_LINES, else one."""
    draw = random.Random(f"{task} of hybrid {seed}")
    while True:
        lines = [line for line in MAKERS[task](draw) if question(task, line["prompt"]) not in banned]
        draw.shuffle(lines)
        while lines:
            taken = [lines.pop() for _ in range(min(len(lines), most, draw.choice((1, 2, 4, 8))))]
            if task not in QUESTION_LINES:
                taken = taken[:1]
            prompts = [taken[0]["prompt"], *(question(task, line["prompt"]) for line in taken[1:])]
            if taken[0].get("distance"):
                example = Example.from_dict(taken[0])
                prompts = [filler.decode(filler.encode(filled_prompt(example, filler)).ids)]
            answers = [" " + line.get("written", line["answer"]) for line in taken]
            gap = "\n\n" if task == "arithmetic" else "\n"
            done = "".join(f"{p}{a}{gap}" for p, a in zip(prompts[:-1], answers[:-1], strict=True))
            yield Document(done + prompts[-1], answers[-1] + "\n")


def stories(corpus: Path, banned: set[str]) -> Iterator[Document]:
    """The rows of a corpus, each up to the end of its story."""
    tokenizer = twotower.load().tokenizer
    assert tokenizer is not None
    for file in sorted(corpus.glob("*.safetensors")):
        for row in load_file(file)["ids"]:
            ids = row.tolist()[1:]
            text = tokenizer.decode(ids[: ids.index(1)] if 1 in ids else ids).strip()
            if not any(text.startswith(prompt) for prompt in banned):
                yield Document("", text + "\n")


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
    parser.add_argument("stories", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=100000, help="how many to write in all")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    filler = twotower.load().tokenizer
    assert filler is not None

    held_out = {task: MAKERS[task](random.Random(f"{task} held out")) for task in ("sums", "python")}
    for task, lines in held_out.items():
        write(a.out / f"{task}.jsonl", [{k: v for k, v in line.items() if k != "written"} for line in lines])
    for task in MAKERS.keys() - held_out.keys() | {"stories"}:
        held_out[task] = [json.loads(line) for line in (SHIPPED / f"{task}.jsonl").read_text().splitlines()]
    banned = {task: {question(task, line["prompt"]) for line in lines} for task, lines in held_out.items()}

    plain = {"stories": stories(a.stories, banned["stories"]), "english": english(a.packages)}
    text: list[Document] = []
    for task, percent in PLAIN_SHARES.items():
        source = list(plain[task])
        random.Random(task).shuffle(source)
        text += source[: a.documents * percent // 100]
    for task, percent in SHARES.items():
        text += islice(documents(task, 0, banned[task], filler, most=8), a.documents * percent // 100)
    answers: list[Document] = []
    unseen: list[Document] = []
    for task, percent in ANSWER_SHARES.items():
        own = list(islice(documents(task, 1, banned[task], filler), a.documents * percent // 100))
        seen = {question(task, document.prompt) for document in own}
        fresh = (d for d in documents(task, 2, banned[task], filler) if question(task, d.prompt) not in seen)
        answers += own
        unseen += islice(fresh, percent * 3)
    for seed, part in enumerate((text, answers, unseen)):
        random.Random(seed).shuffle(part)

    end = SPECIAL[2] * ENDS
    write(a.out / "text.jsonl", [{"text": d.prompt + d.answer} for d in text])
    for name, part in (("answers", answers), ("held_out_answers", unseen)):
        write(a.out / f"{name}.jsonl", [{"prompt": d.prompt, "text": d.answer + end} for d in part])
    train_tokenizer([d.prompt + d.answer for d in text]).save(str(a.out / "tokenizer.json"))


if __name__ == "__main__":
    main()
