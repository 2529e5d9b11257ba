"""A task under several settings: which prompts are timed, and what the report says of it."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from twotower.decoding.output import GenerationStats
from twotower.decoding.params import SamplingParams
from twotower.eval import evaluate as module
from twotower.eval.answering import ScoredAnswer
from twotower.eval.evaluate import SpeedConfig, TaskResult, evaluate
from twotower.eval.report import (
    group_scores,
    quality_table,
    speed_table,
    to_json,
    tokens_per_call,
    tokens_per_pass,
    total_gain,
)
from twotower.eval.tasks import Example, Task
from twotower.eval.throughput import Quartiles, Speed

SETTINGS = {
    "ar": SamplingParams(mode="ar", seed=0, temperature=1.0),
    "diffusion": SamplingParams(seed=0, temperature=1.0, block_size=8),
}


def reply(score=1.0, text="a", degenerate=False, tokens=8, nfe=4, context=3):
    stats = GenerationStats(
        denoiser_calls=nfe, context_calls=context, seconds_to_first_token=0, seconds_total=1, num_tokens=tokens
    )
    return ScoredAnswer(text, score, degenerate, stats, [])


def speed(gain):
    return Speed(Quartiles(1, 2, 3), Quartiles(gain - 0.1, gain, gain + 0.1), Quartiles(0, 0, 0))


def result(name="t", gain=None, **answers):
    examples = tuple(Example(prompt=str(i), scorer="exact", max_new_tokens=1, group=f"g{i % 2}") for i in range(2))
    timed = {} if gain is None else {1: {"ar": speed(1), "diffusion": speed(gain)}}
    return TaskResult(Task(name, examples), SETTINGS, answers, timed, {size: [0, 1] for size in timed})


def test_a_task_is_answered_and_timed(model, asking):
    said = []
    timing = SpeedConfig(prompts=2, batch_sizes=(1, 2))
    found = evaluate(model, asking("likelihood"), SETTINGS, timing, said.append)
    assert list(found.answers) == ["ar", "diffusion"]
    assert [len(a) for a in found.answers.values()] == [10, 10]
    assert list(found.speeds) == [1, 2]
    assert {size: len(examples) for size, examples in found.timed.items()} == {1: 2, 2: 2}
    assert said == [
        "asked: answers of ar",
        "asked: answers of diffusion",
        "asked: speed at batch 1",
        "asked: speed at batch 2",
    ]


@pytest.fixture
def timed(monkeypatch):
    """What is timed, with every answer sound but those that the returned dict gives to a mode and an example."""
    works = []
    bad = {"ar": {}, "diffusion": {}}

    def answers(_, task, params):
        return [bad[params.mode].get(i, reply()) for i in range(len(task.examples))]

    monkeypatch.setattr(module, "answer", answers)
    monkeypatch.setattr(module, "speeds", lambda _, work, repeats: works.append(work) or {})
    return works, bad


def test_prompts_where_any_answer_is_unsound_are_not_timed(model, asking, timed):
    works, bad = timed
    bad["ar"][0] = reply(text=" ")
    bad["diffusion"][2] = reply(degenerate=True)
    task = asking("exact")
    found = evaluate(model, task, SETTINGS, SpeedConfig(prompts=8))
    sound = [1, 3, 4, 5, 6, 7, 8, 9]
    assert found.timed == {1: sound}
    assert works[0].prompts == [model.tokenizer.encode(task.examples[i].prompt).ids for i in sound]
    assert [p.seed for p in works[0].settings["diffusion"]] == sound


def test_timed_prompts_are_a_sample_by_the_seed_in_the_files_order(model, asking, timed):
    def drawn(seed):
        settings = {name: dataclasses.replace(params, seed=seed) for name, params in SETTINGS.items()}
        return evaluate(model, asking("exact"), settings, SpeedConfig(prompts=4)).timed[1]

    samples = [drawn(seed) for seed in range(20)]
    assert drawn(0) == samples[0]
    assert all(sample == sorted(set(sample)) and len(sample) == 4 for sample in samples)
    assert {i for sample in samples for i in sample} == set(range(10))


def test_batches_are_whole_and_one_that_is_not_filled_is_said(model, asking, timed):
    works, bad = timed
    bad["ar"] |= {i: reply(text="") for i in range(4)}
    found = evaluate(model, asking("exact"), SETTINGS, SpeedConfig(prompts=8, batch_sizes=(1, 4, 8)))
    assert [len(work.prompts) for work in works] == [6, 4]
    assert found.timed[1] == [4, 5, 6, 7, 8, 9]
    assert set(found.timed[4]) < set(found.timed[1])
    assert found.timed[8] == []
    assert list(found.speeds) == [1, 4]
    _, prompts, sizes, _, said, _, _ = (list(column.cells) for column in speed_table([found]).columns)
    place = said.index("not timed: sound answers in every mode to fewer than 8")
    assert (prompts[place], sizes[place]) == ("0", "8")


def test_a_setting_with_mostly_unsound_answers_is_not_timed(model, asking, monkeypatch):
    def answers(_, task, params):
        bad = 6 if params.mode == "diffusion" else 0
        return [reply(degenerate=i < bad) for i in range(len(task.examples))]

    monkeypatch.setattr(module, "answer", answers)
    found = evaluate(model, asking("exact"), SETTINGS, SpeedConfig(prompts=2))
    assert list(found.speeds[1]) == ["ar"]
    assert len(found.timed[1]) == 2
    assert "not timed: most answers degenerate or empty" in list(speed_table([found]).columns[4].cells)
    assert total_gain([found], "diffusion", 1) is None


def test_where_answers_are_unsound_or_ar_scores_nothing_nothing_is_timed(model, asking, monkeypatch):
    monkeypatch.setattr(module, "answer", lambda _, task, params: [reply(degenerate=True)] * len(task.examples))
    assert evaluate(model, asking("exact"), SETTINGS, SpeedConfig()).timed == {1: []}
    monkeypatch.setattr(module, "answer", lambda _, task, params: [reply(score=0)] * len(task.examples))
    assert evaluate(model, asking("exact"), SETTINGS, SpeedConfig()).timed == {}


@pytest.mark.parametrize("bad", [{"repeats": 4}, {"batch_sizes": ()}, {"batch_sizes": (9,)}, {"batch_sizes": (0,)}])
def test_bad_timing_is_a_mistake(bad):
    with pytest.raises(ValueError, match="must be"):
        SpeedConfig(**bad)


def test_tokens_of_degenerate_answers_do_not_count():
    assert tokens_per_call([reply(), reply(tokens=999, degenerate=True)]) == (2.0, 4.0)
    assert tokens_per_call([reply(nfe=0, context=1)]) == (None, None)
    assert tokens_per_pass(2.04, 2.04) == pytest.approx(1.02)
    assert tokens_per_pass(None, 1.25) == 1.25
    assert tokens_per_pass(None, None) is None


def test_groups_and_gains():
    results = [result(ar=[reply(1), reply(1)], diffusion=[reply(0), reply(1)], gain=2.0)]
    results.append(result(name="u", ar=[reply(), reply()], diffusion=[reply(), reply()]))
    assert group_scores(results[0], "diffusion") == {"g0": 0, "g1": 1}
    assert total_gain(results, "diffusion", 1) == 2.0
    assert total_gain(results[1:], "diffusion", 1) is None


def test_a_gain_counts_only_where_half_of_the_score_is_kept():
    results = [
        result(name="kept", ar=[reply(), reply()], diffusion=[reply(), reply(0)], gain=2.0),
        result(name="lost", ar=[reply(), reply()], diffusion=[reply(0.9), reply(0)], gain=9.0),
        result(name="lucky", ar=[reply(0), reply()], diffusion=[reply(), reply()], gain=7.0),
    ]
    assert total_gain(results, "diffusion", 1) == 2.0
    assert total_gain(results[1:], "diffusion", 1) is None
    assert to_json(results)["overall"]["diffusion"]["tasks_in_gain"] == {1: ["kept"]}
    table = speed_table(results)
    tasks, _, _, _, _, gains, _ = (list(column.cells) for column in table.columns)
    assert "less than 50% of ar's score is kept" in table.caption
    assert speed_table(results[:1]).caption is None
    assert gains[1::2][:3] == [
        "2.00 (1.90 to 2.10)",
        "9.00 (8.90 to 9.10)*",
        "7.00 (6.90 to 7.10)*",
    ]
    assert (tasks[-1], gains[-1]) == ("all: kept", "2.00")


def test_the_speed_table_keeps_the_order_of_settings_and_fits_80_columns():
    params = {"ar": SETTINGS["ar"]} | {f"diffusion γ 0.{i}": SETTINGS["diffusion"] for i in range(9)}
    answers = {name: [reply(), reply()] for name in params}
    own = Speed(Quartiles(1e3, 2e3, 3e3), Quartiles(1, 2, 3), Quartiles(0.1, 0.2, 0.3))
    by_name = dict.fromkeys(("ar", "diffusion γ 0.0", "diffusion γ 0.5"), own)
    results = [
        TaskResult(Task(name, result(ar=[]).task.examples), params, answers, {1: by_name}, {1: [0, 1]})
        for name in ("arithmetic", "json", "lists")
    ]
    table = speed_table(results)
    assert list(table.columns[3].cells)[:10] == [*by_name, *(name for name in params if name not in by_name)]
    assert next(iter(table.columns[6].cells)) == "100.00"  # 0.2 s for both prompts
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    assert {len(line) for line in lines} == {80}
    assert any("arithmetic" in line for line in lines)


def test_json_says_undefined_with_null():
    zero = result(ar=[reply(0), reply(0)], diffusion=[reply(1), reply(0)])
    one = result(name="u", ar=[reply(), reply()], diffusion=[reply(1), reply(0.5)], gain=1.5)
    found = json.loads(json.dumps(to_json([zero, one])))
    assert found["tasks"]["t"]["settings"]["diffusion"]["retention"] == {"value": None, "low": None, "high": None}
    assert found["overall"]["diffusion"]["retention"]["value"] == 0.75
    assert found["overall"]["diffusion"]["tasks_in_retention"] == ["u"]
    assert found["overall"]["diffusion"]["tasks_left_out"] == {"t": "ar scores 0"}
    assert found["overall"]["diffusion"]["gain"] == {"1": 1.5}
    assert found["tasks"]["u"]["timed_examples"] == {"1": [0, 1]}
    assert found["tasks"]["u"]["settings"]["diffusion"]["speed"]["1"]["gain"]["median"] == 1.5
    assert found["tasks"]["u"]["settings"]["diffusion"]["answers"][1] == {
        "text": "a",
        "score": 0.5,
        "degenerate": False,
    }
    assert found["settings"]["diffusion"]["block_size"] == 8
    assert "max_new_tokens" not in found["settings"]["diffusion"]


def test_the_table_names_the_tasks_of_its_means_and_why_others_are_not_there():
    table = quality_table(
        [
            result(name="zero", ar=[reply(0), reply(0)], diffusion=[reply(1), reply(0)]),
            result(name="lucky", ar=[reply(1), reply(0)], diffusion=[reply(1), reply(1)]),
            result(name="one", ar=[reply(1), reply(1)], diffusion=[reply(1), reply(0)]),
            result(name="two", ar=[reply(1), reply(1)], diffusion=[reply(0), reply(0)]),
        ]
    )
    tasks, _, _, _, shares, *_ = (list(column.cells) for column in table.columns)
    assert tasks[-1] == "all: one, two"
    assert shares[-1].startswith("25.0% (")
    assert shares[1] == "undefined: ar scores 0"
    assert shares[3].startswith("200.0%")
    assert 'zero is not in "all": ar scores 0' in table.caption
    assert 'lucky is not in "all": ar scores 0.500 with a standard error of 71% of that' in table.caption


def test_where_no_task_counts_there_is_no_mean():
    table = quality_table([result(ar=[reply(0), reply(0)], diffusion=[reply(1), reply(0)])])
    assert list(table.columns[0].cells) == ["t", ""]


def test_the_table_says_where_texts_are_identical():
    def shown(mode):
        found = result(ar=[reply()] * 2, diffusion=[reply()] * 2)
        settings = SETTINGS | {"diffusion": SamplingParams(mode=mode, seed=0)}
        return list(quality_table([dataclasses.replace(found, settings=settings)]).columns[4].cells)

    assert shown("verified")[1:] == ["100.0% (identical texts)"] * 2
    # two questions say little of what diffusion would make of others
    assert shown("diffusion")[1:] == ["100.0% (25.0% to 100.0%)"] * 2
