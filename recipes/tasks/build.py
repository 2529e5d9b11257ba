"""Writes src/twotower/data/tasks, the tasks of `twotower eval`; always the same bytes.

python recipes/tasks/build.py [DIRECTORY]

With a seed it writes other questions of the same kinds, none of which is in those tasks, to choose settings with:
python recipes/tasks/build.py DIRECTORY --seed 1 --rounds 8
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import twotower
from twotower.eval.tasks import FILLER, SHIPPED, Example

STORY_PROMPTS = Path(__file__).parents[2] / "benchmarks" / "stories_prompts.json"

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "stones", "pens", "cards", "shells", "eggs")
WORDS = ("red", "moon", "fish", "table", "green", "cloud", "seven", "river", "lamp", "north", "salt", "bird", "glass")
OBJECTS = ("lamp", "table", "boat", "clock", "drum", "ladder", "basket", "kite")
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Delhi", "Rome")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FEW = ("two", "three", "four", "five", "six")
# An order in a customer's words: what is filled in is what the task asks for
ORDERS = (
    "{name} from {city} wants {count} {item} by {day} and pays {price} euros.",
    "By {day}, please send {count} {item} to {name} in {city}; the price of {price} euros is fine.",
    "This is {name}. I offer {price} euros for {count} {item}. I am in {city} until {day}.",
    "We sold {count} {item} for {price} euros to {name}, who comes to {city} on {day}.",
    "On {day} a parcel with {count} {item} goes to {city}. {name} has paid {price} euros.",
    "For {price} euros {name} gets {count} {item}. They must be in {city} on {day}.",
)
# What a function returns, in words and in Python
FUNCTIONS = {
    "the sum of {a} and {b}": "{a} + {b}",
    "the difference of {a} and {b}": "{a} - {b}",
    "the product of {a} and {b}": "{a} * {b}",
    "the larger of {a} and {b}": "max({a}, {b})",
    "the smaller of {a} and {b}": "min({a}, {b})",
    "whether {a} is larger than {b}": "{a} > {b}",
    "whether {a} is smaller than {b}": "{a} < {b}",
    "whether {a} is equal to {b}": "{a} == {b}",
    "whether {a} is a multiple of {b}": "{a} % {b} == 0",
    "the rest of {a} divided by {b}": "{a} % {b}",
    "{n} times the sum of {a} and {b}": "{n} * ({a} + {b})",
    "the square of {a} plus {b}": "{a} ** 2 + {b}",
    "the sum of {a}, {b} and {n}": "{a} + {b} + {n}",
    "the product of {a} and {b}, less {n}": "{a} * {b} - {n}",
    "a list of {a}, {b} and {n}": "[{a}, {b}, {n}]",
    "a sorted list of {a} and {b}": "sorted([{a}, {b}])",
    "the larger of {a} and {n} times {b}": "max({a}, {n} * {b})",
    "{a} as text followed by {b} as text": "str({a}) + str({b})",
}

Line = dict[str, Any]


def stories(_: random.Random) -> list[Line]:
    """Beginnings of stories that the context tower sampled with seeds that no training has used."""
    tokenizer = twotower.load().tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.decode(ids) for ids in json.loads(STORY_PROMPTS.read_text())]
    return [{"prompt": prompt, "scorer": "likelihood", "max_new_tokens": 192} for prompt in prompts]


def arithmetic(draw: random.Random) -> list[Line]:
    """Word problems of one to three steps, each after two solved examples."""
    solved = (
        "Question: Tom has 3 pens and buys 4 pens. How many pens does Tom have?\nAnswer: 7\n\n"
        "Question: Sue has 9 eggs. Sue gives away 5 eggs. How many eggs does Sue have left?\nAnswer: 4\n\n"
    )
    lines = []
    for i in range(48):
        steps = 1 + i % 3
        name, thing = draw.choice(NAMES), draw.choice(THINGS)
        total = draw.randint(10, 60)
        told = [f"{name} has {total} {thing}."]
        for _ in range(steps):
            kinds = ("buys", "doubles") if total < 3 else ("buys", "gives away", "doubles")
            kind = draw.choice(kinds if total < 100 else ("gives away",))
            number = draw.randint(2, max(2, min(total, 30) - 1))
            if kind == "doubles":
                total *= 2
                told.append(f"Then {name} gets as many {thing} again.")
            else:
                total += number if kind == "buys" else -number
                told.append(f"Then {name} {kind} {number} {thing}.")
        question = f"{' '.join(told)} How many {thing} does {name} have now?"
        prompt = f"{solved}Question: {question}\nAnswer:"
        lines.append(short(prompt, str(total), "number", group=f"{steps} steps" if steps > 1 else "1 step"))
    return lines


def recall(draw: random.Random) -> list[Line]:
    """The values of three keys, then as many tokens of filler as the group says, then a question for one of them."""
    lines = []
    for distance in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        for _ in range(4):
            keys = draw.sample(NAMES, 3)
            values = [str(draw.randint(1000, 9999)) for _ in keys]
            told = " ".join(f"The number of {key} is {value}." for key, value in zip(keys, values, strict=True))
            asked = draw.randrange(3)
            prompt = f"{told}\n{FILLER}\nThe number of {keys[asked]} is"
            lines.append(
                short(prompt, values[asked], "number", group=f"{distance} tokens", stop=[".", "\n"], distance=distance)
            )
    return lines


def lists(draw: random.Random) -> list[Line]:
    """Lists to copy, reverse, sort or take the last word of, each after one solved example."""
    done = ["glass", "moon", "bird"]
    tasks: dict[str, Callable[[list[str]], str]] = {
        "copy": " ".join,
        "reverse": lambda words: " ".join(reversed(words)),
        "sort": lambda words: " ".join(sorted(words)),
        "last": lambda words: words[-1],
    }
    lines = []
    for i in range(48):
        name, solve = list(tasks.items())[i % len(tasks)]
        words = draw.sample(WORDS, 3 + i // len(tasks) % 6)
        prompt = f"{name}: {' '.join(done)} ->{' ' + solve(done)}\n{name}: {' '.join(words)} ->"
        lines.append(short(prompt, solve(words), "exact", group=name))
    return lines


def to_json(draw: random.Random) -> list[Line]:
    """A sentence whose facts are to be written as a JSON object, after two solved examples."""
    done = (
        'Text: Tom is 30 years old and lives in Berlin.\nJSON: {"name": "Tom", "age": 30, "city": "Berlin"}\n'
        'Text: Sue, 41, whose home is Madrid, owns a lamp.\nJSON: {"name": "Sue", "age": 41, "city": "Madrid", '
        '"owns": ["lamp"]}\n'
    )
    lines = []
    for i, age in enumerate(draw.sample(range(5, 90), 40)):
        fact: Line = {"name": draw.choice(NAMES), "age": age, "city": draw.choice(CITIES)}
        if i % 2:
            fact["owns"] = draw.sample(OBJECTS, 1 + i // 2 % 3)
            things = " and ".join(f"a {thing}" for thing in fact["owns"])
            text = f"{fact['name']}, {fact['age']}, whose home is {fact['city']}, owns {things}."
        else:
            text = f"{fact['name']} is {fact['age']} years old and lives in {fact['city']}."
        lines.append(short(f"{done}Text: {text}\nJSON:", json.dumps(fact), "json", length=64))
    return lines


def dialogue(draw: random.Random) -> list[Line]:
    """Conversations of 1 to 16 turns; the last question is about what was said in one of them."""
    lines = []
    for turns in (1, 2, 4, 8, 16):
        for _ in range(8):
            names = draw.choices(NAMES, k=turns) if turns > len(NAMES) else draw.sample(NAMES, turns)
            names = [f"{name} {chr(65 + i)}." for i, name in enumerate(names)]
            liked = [draw.choice(WORDS) for _ in names]
            said = "".join(
                f"User: The word of {name} is {word}.\nAssistant: I will remember {word}.\n"
                for name, word in zip(names, liked, strict=True)
            )
            asked = draw.randrange(turns)
            prompt = f"{said}User: What is the word of {names[asked]}?\nAssistant: The word is"
            group = f"{turns} turns" if turns > 1 else "1 turn"
            lines.append(short(prompt, liked[asked], "exact", group=group, stop=[".", "\n"]))
    return lines


def sums(draw: random.Random) -> list[Line]:
    """Sums of two numbers of two digits, to be written with their working, as at school."""
    lines = []
    for _ in range(48):
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        working = f"{a // 10 * 10} + {b // 10 * 10} + {a % 10} + {b % 10} = {tens} + {ones} = {a + b}"
        lines.append(short(f"{a} + {b} =", working, "exact"))
    return list({line["prompt"]: line for line in lines}.values())  # two numbers may come up twice


def extraction(draw: random.Random) -> list[Line]:
    """What customers ordered, in their words, whose fields are to be written in a fixed order."""
    lines = []
    for i in range(48):
        fact = {"name": draw.choice(NAMES), "item": draw.choice(THINGS), "count": str(draw.randint(2, 99))}
        fact |= {"city": draw.choice(CITIES), "day": draw.choice(DAYS), "price": str(draw.randint(10, 999))}
        text = ORDERS[i % len(ORDERS)].format(**fact)
        fields = "; ".join(f"{field}={value}" for field, value in fact.items())
        lines.append(short(f"Order: {text}\nFields:", fields, "exact", length=48))
    return lines


def appointments(draw: random.Random) -> list[Line]:
    """Conversations in which a user tells who comes when and brings what, and then asks about one of them."""
    lines = []
    for turns in (1, 2, 3, 4):
        for _ in range(10):
            names = draw.sample(NAMES, turns)
            visits = [
                f"{name} comes on {draw.choice(DAYS)}. {name} brings {draw.choice(FEW)} {draw.choice(THINGS)}."
                for name in names
            ]
            told = "".join(f"User: {visit}\nAssistant: I will remember that.\n" for visit in visits)
            asked = draw.randrange(turns)
            prompt = f"{told}User: What about {names[asked]}?\nAssistant:"
            group = f"{turns} turns" if turns > 1 else "1 turn"
            lines.append(short(prompt, visits[asked], "exact", group=group))
    return lines


def functions(draw: random.Random) -> list[Line]:
    """Python functions of one expression with a docstring, to be written from what they return."""
    lines = []
    for _ in range(40):
        what, expression = draw.choice(list(FUNCTIONS.items()))
        a, b = draw.sample("abcdefghkmnpqrstuvwxyz", 2)
        n, name = draw.randint(2, 99), draw.choice(WORDS)
        said, value = what.format(a=a, b=b, n=n), expression.format(a=a, b=b, n=n)
        written = f'def {name}({a}, {b}):\n    """Returns {said}."""\n    return {value}'
        lines.append(short(f"# {name}({a}, {b}) returns {said}.\n", written, "exact", stop=["\n\n"], length=64))
    return lines


def short(
    prompt: str,
    answer: str,
    scorer: str,
    *,
    group: str = "",
    stop: list[str] | None = None,
    length: int = 32,
    distance: int = 0,
) -> Line:
    """A line of a task file whose answer ends with its line of text, or at `stop`."""
    line: Line = {"prompt": prompt, "answer": answer, "scorer": scorer, "max_new_tokens": length}
    line["stop"] = ["\n"] if stop is None else stop
    return line | ({"group": group} if group else {}) | ({"distance": distance} if distance else {})


TASKS = {
    "appointments": appointments,
    "arithmetic": arithmetic,
    "dialogue": dialogue,
    "extraction": extraction,
    "functions": functions,
    "json": to_json,
    "lists": lists,
    "recall": recall,
    "stories": stories,
    "sums": sums,
}


def write(directory: Path) -> None:
    """The tasks that come with the package."""
    _write(directory, {name: make(random.Random(name)) for name, make in TASKS.items()})


def write_others(directory: Path, seed: int, rounds: int) -> None:
    """Other questions than `write`'s, of which there are `rounds` times as many, less those that come twice. The
    stories are not among them: their beginnings are no questions that could be drawn again."""
    made = {}
    for name in (name for name in TASKS if name != "stories"):
        known = {line["prompt"] for line in TASKS[name](random.Random(name))}
        drawn = [line for i in range(rounds) for line in TASKS[name](random.Random(f"{name} {seed} {i}"))]
        made[name] = list({line["prompt"]: line for line in drawn if line["prompt"] not in known}.values())
    _write(directory, made)


def _write(directory: Path, tasks: dict[str, list[Line]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, lines in tasks.items():
        for line in lines:
            Example.from_dict(line)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=SHIPPED)
    parser.add_argument("--seed", type=int, help="write other questions, drawn with this seed")
    parser.add_argument("--rounds", type=int, default=1, help="how many times as many of them")
    options = parser.parse_args()
    if options.seed is None and options.rounds == 1:
        write(options.directory)
    elif options.seed is None or options.rounds < 1 or options.directory == SHIPPED:
        parser.error("other questions need --seed, --rounds of at least 1, and a DIRECTORY of their own")
    else:
        write_others(options.directory, options.seed, options.rounds)


if __name__ == "__main__":
    main()
