"""The hybrid's texts: no held-out question in them, answers that are right, and a tokenizer that loses nothing."""

import importlib.util
import random
from itertools import islice
from pathlib import Path

import pytest

from twotower.eval.tasks import Example

FILE = Path(__file__).parents[2] / "recipes" / "hybrid" / "build.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("hybrid_recipe", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", ["lists", "json", "arithmetic", "dialogue", "sums", "python"])
def test_banned_questions_are_not_asked(recipe, byte_tokenizer, task):
    asked = list(islice(recipe.documents(task, 0, set(), byte_tokenizer), 30))
    banned = {recipe.question(task, asked[0].prompt)}
    again = list(islice(recipe.documents(task, 0, banned, byte_tokenizer, most=8), 60))
    assert not any(question in document.prompt + document.answer for question in banned for document in again)


def test_several_questions_are_answered_but_the_last(recipe, byte_tokenizer):
    many = max(islice(recipe.documents("sums", 0, set(), byte_tokenizer, most=8), 20), key=lambda d: len(d.prompt))
    *solved, last = many.prompt.split("\n")
    assert len(solved) == 7
    for line in (*solved, last + many.answer.rstrip("\n")):
        left, right = line.split(" = ")
        assert eval(left) == int(right)
    assert all("\n" not in d.prompt for d in islice(recipe.documents("sums", 0, set(), byte_tokenizer), 20))


@pytest.mark.slow
def test_python_answers_pass_their_own_tests(recipe):
    for line in recipe.python(random.Random(0))[:5]:
        example = Example.from_dict({key: value for key, value in line.items() if key != "written"})
        assert example.score(f" {line['written']}\n") == 1
        assert example.score(" None\n") == 0


def test_recall_stays_within_a_row(recipe, byte_tokenizer):
    for document in islice(recipe.documents("recall", 0, set(), byte_tokenizer), 5):
        told, _, asked = document.prompt.split("\n")
        assert document.answer.strip() in told
        assert asked.split(" is")[0] in told


def test_the_tokenizer_keeps_digits_apart_and_loses_nothing(recipe):
    text = "Tom is 305 years old: naïve 東京\n</s>"
    tokenizer = recipe.train_tokenizer(["Tom is 30 years old.", text])
    found = tokenizer.encode(text)
    assert (found.ids[0], found.ids[-1]) == (1, 2)
    assert [token for token in found.tokens if token.isdigit()] == ["3", "0", "5"]
    assert tokenizer.decode(found.ids[1:-1]) == text.removesuffix("</s>")
    assert [tokenizer.token_to_id(token) for token in recipe.SPECIAL] == [0, 1, 2, 3]
