"""Right and wrong replies by each scorer, and what counts as a loop."""

import hypothesis
import pytest
from hypothesis import strategies as st

from twotower.eval.judging import is_degenerate, judge

STORY = (
    "Once upon a time there was a cat named Tom. Tom liked to run and jump all day. One day he saw a big red ball in "
    "the park and wanted to play with it. A girl came and said that the ball was hers, but that he could play too. "
    "They threw it far away, ran after it and laughed until the sun went down behind the hills and it was time for bed."
)


@pytest.mark.parametrize(
    ("scorer", "answer", "right", "wrong"),
    [
        ("exact", "blue", [" blue", "blue\n"], ["Blue", "blue sky", ""]),
        ("number", "1200", ["1,200", " 1200 apples", "1200.0", "is 1200."], ["120", "-1200", "a lot", "3 or 1200"]),
        ("number", "34", ["34"], ["3,4", "3, 4"]),
        ("number", "3", ["3,4", "3,4567"], ["4"]),
        ("number", "1,234,567", ["1234567", "1,234,567."], ["1", "1,234"]),
        ("number", "9007199254740993", ["9007199254740993"], ["9007199254740992"]),
        ("number", "-3.5", ["-3.5"], ["3.5"]),
        ("json", '{"a": 1, "b": [2]}', ['{"b":[2],"a":1}', ' {"a": 1,\n"b": [2]}'], ['{"a": 1}', '{"a": 1', "", "[]"]),
        ("json", '{"a": 1}', ['{"a": 1.0}'], ['{"a": true}', '{"a": "1"}', '{"a": [1]}', '{"a": NaN}']),
        ("json", "[false, 0]", ["[false,-0]"], ["[0, false]", "[0, 0]", "[false, false]"]),
        ("program", "assert f(2) == 4", ["    return 2 * x", "    return x + 2"], ["    return x", "    retrun", ""]),
    ],
)
def test_right_and_wrong_answers(scorer, answer, right, wrong):
    assert [judge(scorer, answer, text, "def f(x):\n") for text in right] == [1.0] * len(right)
    assert [judge(scorer, answer, text, "def f(x):\n") for text in wrong] == [0.0] * len(wrong)


# Texts that are almost JSON and numbers, and whatever else there is.
REPLIES = st.text() | st.text(alphabet=st.characters()) | st.text(alphabet='[]{}",:0123456789eE+-.\\u ntrfalse')
ANSWERS = {"exact": "blue", "number": "-1,200.5", "json": '{"a": [1, true]}', "program": "assert f"}


@pytest.mark.parametrize("scorer", ANSWERS)
@pytest.mark.parametrize(
    "text",
    [
        "123" * 1700 + "4",
        "[" * 100_000,
        "1e99999999999999999999",
        "-1e-99999999999999999999",
        '"\\ud800"',
        "\ud800",
        "\0",
        "٣",
        "²",
        "-Infinity",
        "nan",
    ],
)
def test_no_reply_ends_an_evaluation(scorer, text, monkeypatch):
    monkeypatch.setattr("twotower.eval.judging.is_degenerate", lambda text: False)  # which would keep some from scorers
    assert judge(scorer, ANSWERS[scorer], text) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("scorers", "times"), [(("exact", "number", "json"), 150), (("program",), 5)])
def test_any_reply_is_worth_0_or_1(scorers, times):
    @hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=times)
    @hypothesis.given(REPLIES)
    def check(text: str) -> None:
        assert {judge(scorer, ANSWERS[scorer], text) for scorer in scorers} <= {0.0, 1.0}

    check()


def test_a_right_answer_with_a_loop_after_it_is_wrong():
    assert judge("number", "7", "7, because 3 and 4 make 7.") == 1.0
    assert judge("number", "7", "7. " + "The answer is 7. " * 4) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "a" * 40,
        "They were happy. " * 4,
        "Good start. " + "and then \n" * 8,
        STORY + " the dog ran" * 6,
        "the dog ran " * 6 + STORY,
        # whole sentences come again, but never four times in a row
        " ".join(f"{STORY} {ending}" for ending in ("Then it rained.", "And so it went.", "Nobody knew why.")),
    ],
)
def test_loops_are_degenerate(text):
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        STORY,
        "no " * 3 + "yes",
        "[0, 0, 0, 0, 0, 0]",
        "    " * 30 + "return x",
        "They were happy. " * 3,
        "a" * 39,
    ],
)
def test_ordinary_texts_are_not(text):
    assert not is_degenerate(text)
