"""The hybrid's texts: no held-out question in them, answers that are right, and a tokenizer that loses nothing."""

import importlib.util
import json
from itertools import islice
from pathlib import Path

import pytest

from twotower.eval.tasks import SHIPPED, Example, shipped_tasks

FOLDER = Path(__file__).parents[2] / "recipes" / "hybrid"


def shipped_lines(task):
    return [json.loads(line) for line in (SHIPPED / f"{task}.jsonl").read_text().splitlines()]


def opened(name):
    spec = importlib.util.spec_from_file_location(f"hybrid_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return opened("build")


def test_every_task_has_its_shares(recipe):
    assert set(recipe.SHARES) == set(recipe.ANSWER_SHARES) <= set(shipped_tasks())
    assert sum(recipe.SHARES.values()) + recipe.ENGLISH_SHARE == sum(recipe.ANSWER_SHARES.values()) == 100


@pytest.mark.parametrize("task", ["lists", "json", "extraction", "functions", "sums", "appointments"])
def test_banned_questions_are_not_asked(recipe, task):
    asked = list(islice(recipe.documents(task, 0, set()), 30))
    banned = {recipe.question(task, asked[0].prompt)}
    again = list(islice(recipe.documents(task, 0, banned, most=8), 60))
    assert not any(question in document.prompt + document.answer for question in banned for document in again)


def test_several_questions_are_answered_but_the_last(recipe):
    many = max(islice(recipe.documents("sums", 0, set(), most=8), 20), key=lambda d: len(d.prompt))
    *solved, last = many.prompt.split("\n")
    assert len(solved) == 7
    for line in (*solved, last + many.answer.rstrip("\n")):
        assert len({eval(part) for part in line.split(" = ")}) == 1
    assert all("\n" not in d.prompt for d in islice(recipe.documents("sums", 0, set()), 20))


@pytest.mark.parametrize("task", ["lists", "json", "extraction", "functions", "sums", "appointments"])
def test_what_is_learnt_is_the_right_answer_and_its_end(recipe, task):
    for line in shipped_lines(task):
        reply = recipe.written(line)
        assert reply.endswith(line["stop"][0])
        example = Example.from_dict(line)
        assert example.score(reply.removesuffix(line["stop"][0])) == 1
        assert example.score("no") == 0


@pytest.mark.slow
def test_functions_compute_what_they_say(recipe):
    for line in shipped_lines("functions"):
        found = {}
        exec(line["answer"], found)
        (name,) = found.keys() - {"__builtins__"}
        assert found[name](12, 5) is not None
        assert f"# {name}(" in line["prompt"]


def test_the_tokenizer_keeps_digits_apart_and_loses_nothing(recipe):
    text = "Tom is 305 years old: naïve 東京\n</s>"
    tokenizer = recipe.train_tokenizer(["Tom is 30 years old.", text])
    found = tokenizer.encode(text)
    assert (found.ids[0], found.ids[-1]) == (1, 2)
    assert [token for token in found.tokens if token.isdigit()] == ["3", "0", "5"]
    assert tokenizer.decode(found.ids[1:-1]) == text.removesuffix("</s>")
    assert [tokenizer.token_to_id(token) for token in recipe.SPECIAL] == [0, 1, 2, 3]


def test_a_token_starts_as_itself_or_as_the_pieces_of_its_text(recipe):
    old, new = (recipe.train_tokenizer([text]) for text in ("a moon and a fish\n", "a moonfish, a fish\n"))
    rows = opened("start").sources(old, new)
    assert len(rows) == new.get_vocab_size()
    for token, place in new.get_vocab().items():
        pieces = [old.id_to_token(piece) for piece in rows[place]]
        assert pieces == [token] if token in old.get_vocab() else "".join(pieces) == token
    assert any(len(pieces) > 1 for pieces in rows)
