"""`twotower demo`, in a log and in a terminal."""

import io

import pytest
from rich.console import Console

import twotower
from twotower.cli import demo
from twotower.cli.live import TextsView, steps
from twotower.decoding.params import SamplingParams

LENGTH = 20


@pytest.fixture(scope="module")
def runs(checkpoint):
    loaded = twotower.load(checkpoint)
    modes = ("ar", "diffusion", "verified")
    settings = {mode: SamplingParams(mode=mode, max_new_tokens=LENGTH, ignore_eos=True) for mode in modes}
    return loaded, {mode: demo.Run(list(steps(loaded, "ab", params))) for mode, params in settings.items()}


def test_a_log_gets_both_stories_and_every_speed(run, checkpoint):
    result = run("demo", "ab", "--model", checkpoint, "--max-new-tokens", LENGTH)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    for words in (
        "diffusion: most certain first",
        "ar: one token at a time",
        "tokens per pass",
        "ab",
        "check each draft",
    ):
        assert words in result.stdout
    # the table comes before the sentences that begin with a mode's name
    rows = {line.split()[0]: line.split() for line in reversed(result.stdout.splitlines()) if line.strip()}
    for mode in ("ar", "diffusion", "verified"):
        assert float(rows[mode][1]) > 0
    assert rows["ar"][2] == "1.00x"
    # the prompt's pass is not counted, and its logits give the first token
    assert rows["ar"][3:5] == [str(LENGTH - 1), f"{LENGTH / (LENGTH - 1):.1f}"]


def test_without_a_prompt_questions_are_answered_and_judged(run):
    result = run("demo")
    assert result.exit_code == 0, result.output
    wanted = demo.questions(128)
    squeezed = "".join(result.stdout.split())
    for text in wanted:
        assert "".join(text.shown.split()[:4]) in squeezed
    rows = {line.split()[0]: line for line in reversed(result.stdout.splitlines()) if line.strip()}
    assert rows["verified"].rstrip().endswith(f"{len(wanted)} of {len(wanted)}")
    assert rows["ar"].rstrip().endswith(f"{len(wanted)} of {len(wanted)}")
    assert "tokens are those of ar" in result.stdout


def test_a_length_holds_for_questions_too():
    assert [text.max_new_tokens for text in demo.questions(3)] == [3] * len(demo.questions(3))


def test_verified_is_said_to_equal_ar_only_if_it_does(runs):
    _, recorded = runs
    assert recorded["verified"].results[0].token_ids == recorded["ar"].results[0].token_ids
    assert demo._same_or_not(recorded) == f"all {LENGTH} tokens are those of ar."
    result = recorded["ar"].results[0]
    result.token_ids[7] += 1
    try:
        assert "the first 7 tokens" in demo._same_or_not(recorded)
    finally:
        result.token_ids[7] -= 1


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_plays_both_stories_together(runs, width):
    loaded, recorded = runs
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=20, legacy_windows=False)
    views = {
        mode: TextsView(["ab"], loaded.tokenizer, loaded.config.mask_token_id, console) for mode in ("diffusion", "ar")
    }
    demo._play(recorded, views, 0.3, console)
    for mode, view in views.items():
        assert view.text().plain == "ab" + recorded[mode].results[0].text
    drawn = console.file.getvalue()
    assert "▒" in drawn
    assert "times slower than it was" in drawn
    beside = any("diffusion: most" in line and "ar: one" in line for line in drawn.splitlines())
    assert beside == (width == 120)


def test_the_timeline_keeps_each_storys_own_pace(runs):
    _, recorded = runs
    events = list(demo._timeline(recorded))
    assert [event[0] for event in events] == sorted(event[0] for event in events)
    for mode, run in recorded.items():
        own = [(at, piece) for at, m, piece in events if m == mode]
        assert [piece for _, piece in own] == [step.piece for step in run.steps]
        assert own[-1][0] == pytest.approx(run.seconds)


def test_a_text_of_the_prompts_pass_alone_has_no_tokens_per_pass(run, checkpoint):
    result = run("demo", "ab", "--model", checkpoint, "--max-new-tokens", 1)
    assert result.exit_code == 0, result.output
    (row,) = (line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["ar"] and "x" in line)
    assert row[2:] == ["1.00x", "0"]


def test_an_empty_story_is_a_mistake(run, checkpoint):
    result = run("demo", "--model", checkpoint, "--max-new-tokens", 0)
    assert result.exit_code == 2
    assert "max_new_tokens is 0" in result.stderr
