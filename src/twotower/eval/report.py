"""Reports results: means over tasks, the JSON file of `twotower eval` and its tables."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from twotower.decoding.modes import MODES
from twotower.decoding.output import add_drafts, draft_counts
from twotower.decoding.params import SamplingParams
from twotower.eval.answering import ScoredAnswer, mean_score
from twotower.eval.evaluate import TaskResult
from twotower.eval.retention import Interval, mean_retention, not_counted, retention

_UNDEFINED = "undefined"
# A gain in speed counts only if at least this share of ar's score is kept: wrong answers written fast are no gain.
_LEAST_KEPT = 0.5
UNCOUNTED = f"* does not count: less than {_LEAST_KEPT:.0%} of ar's score is kept, or ar scores too little"


def to_json(results: Sequence[TaskResult]) -> dict[str, Any]:
    """Everything that was measured: by setting over all tasks, by task and setting, and every answer.

    A retention or an interval is null if undefined. A gain over all tasks is null if no task counts, and a task's speed
    is missing if nothing was timed. Seconds of prefill are those of all timed examples together.
    """
    settings = results[0].settings
    return {
        "settings": {name: _own_settings(params) for name, params in settings.items()},
        "overall": {name: _overall(results, name) for name in settings},
        "tasks": {result.task.name: _task(result) for result in results},
    }


def total_retention(results: Sequence[TaskResult], name: str) -> Interval:
    """The mean of a setting's retention over the tasks that `left_out` does not name."""
    out = left_out(results)
    return mean_retention([task_retention(r, name) for r in results if r.task.name not in out])


def left_out(results: Sequence[TaskResult]) -> dict[str, str]:
    """The tasks on which ar's score is too low or too uncertain to compare with, each with the reason."""
    reasons = {result.task.name: not_counted(result.answers["ar"]) for result in results}
    return {task: reason for task, reason in reasons.items() if reason is not None}


def task_retention(result: TaskResult, name: str) -> Interval:
    """A setting's retention on one task."""
    exact = MODES[result.settings[name].mode].exact
    return retention(result.answers[name], result.answers["ar"], exact=exact)


def total_gain(results: Sequence[TaskResult], name: str, batch_size: int) -> float | None:
    """The mean of a setting's median gains over `tasks_in_gain`; None if there are none."""
    counted = tasks_in_gain(results, name, batch_size)
    gains = [r.speeds[batch_size][name].gain.median for r in results if r.task.name in counted]
    return statistics.mean(gains) if gains else None


def tasks_in_gain(results: Sequence[TaskResult], name: str, batch_size: int) -> list[str]:
    """The tasks on which the setting was timed and its gain counts."""
    timed = [r for r in results if name in r.speeds.get(batch_size, {})]
    return [r.task.name for r in timed if gain_counts(r, name)]


def gain_counts(result: TaskResult, name: str) -> bool:
    """Whether the task counts in means and the setting keeps at least half of ar's score on it."""
    kept = task_retention(result, name).value
    return not left_out([result]) and kept is not None and kept >= _LEAST_KEPT


def tokens_per_call(answers: Sequence[ScoredAnswer]) -> tuple[float | None, float | None]:
    """New tokens per NFE, and per context call after prefill, of answers that don't loop; None without such calls."""
    counted = [a.stats for a in answers if not a.degenerate]
    tokens = sum(s.num_tokens for s in counted)
    denoiser = sum(s.denoiser_calls for s in counted)
    context = sum(s.context_calls - 1 for s in counted)
    return (tokens / denoiser if denoiser else None, tokens / context if context else None)


def tokens_per_pass(per_nfe: float | None, per_context_call: float | None) -> float | None:
    """New tokens per pass of either tower after prefill, of those per pass of each: 1 / (1/a + 1/b)."""
    each = [1 / rate for rate in (per_nfe, per_context_call) if rate]
    return 1 / sum(each) if each else None


def group_scores(result: TaskResult, name: str) -> dict[str, float]:
    """The mean score of each group of a task, in the file's order; empty if it has no groups."""
    found: dict[str, list[float]] = {}
    for example, reply in zip(result.task.examples, result.answers[name], strict=True):
        if example.group:
            found.setdefault(example.group, []).append(reply.score)
    return {group: statistics.mean(scores) for group, scores in found.items()}


def _overall(results: Sequence[TaskResult], name: str) -> dict[str, Any]:
    sizes = dict.fromkeys(size for result in results for size in result.speeds)
    return {
        "retention": total_retention(results, name)._asdict(),
        "tasks_in_retention": [r.task.name for r in results if r.task.name not in left_out(results)],
        "tasks_left_out": left_out(results),
        "gain": {size: total_gain(results, name, size) for size in sizes},
        "tasks_in_gain": {size: tasks_in_gain(results, name, size) for size in sizes},
    }


def _own_settings(params: SamplingParams) -> dict[str, Any]:
    """The params without the fields that every example sets itself."""
    return {k: v for k, v in dataclasses.asdict(params).items() if k not in ("max_new_tokens", "stop")}


def _task(result: TaskResult) -> dict[str, Any]:
    return {
        "examples": len(result.task.examples),
        "timed_examples": result.timed,
        "settings": {name: _setting(result, name) for name in result.answers},
    }


def _setting(result: TaskResult, name: str) -> dict[str, Any]:
    answers = result.answers[name]
    per_nfe, per_context_call = tokens_per_call(answers)
    return {
        "score": mean_score(answers),
        "degenerate": sum(a.degenerate for a in answers),
        "same_text_as_ar": sum(a.text == b.text for a, b in zip(answers, result.answers["ar"], strict=True)),
        "retention": task_retention(result, name)._asdict(),
        "groups": group_scores(result, name),
        "tokens_per_nfe": per_nfe,
        "tokens_per_context_call": per_context_call,
        "drafts": draft_counts(add_drafts((), (count for a in answers for count in a.stats.drafts))),
        "tokens_per_pass": tokens_per_pass(per_nfe, per_context_call),
        "speed": {
            size: {field: quartiles._asdict() for field, quartiles in vars(by_name[name]).items()}
            for size, by_name in result.speeds.items()
            if name in by_name
        },
        "answers": [{"text": a.text, "score": a.score, "degenerate": a.degenerate} for a in answers],
    }


def quality_table(results: Sequence[TaskResult]) -> Table:
    """Scores and retention, with means over the tasks that count; the caption says why others do not."""
    out = left_out(results)
    table = Table(title="Quality", caption=_reasons(out), caption_justify="left")
    for heading in ("task", "mode", "score", "degenerate", "of ar's score (95 %)", "tokens per NFE", "tokens per pass"):
        table.add_column(heading, justify="left" if heading in ("task", "mode") else "right", overflow="fold")
    for result in results:
        for i, (name, answers) in enumerate(result.answers.items()):
            per_call = tokens_per_call(answers)
            per_pass = _number(tokens_per_pass(*per_call), 2)
            label = result.task.name if i == 0 else ""
            bad = f"{sum(a.degenerate for a in answers)} of {len(answers)}"
            kept = "" if name == "ar" else share(task_retention(result, name))
            table.add_row(label, name, f"{mean_score(answers):.3f}", bad, kept, _number(per_call[0], 2), per_pass)
        table.add_section()
    counted = [r.task.name for r in results if r.task.name not in out]
    for name in results[0].answers if counted else ():
        if name != "ar":
            table.add_row(f"all: {', '.join(counted)}", name, "", "", share(total_retention(results, name)), "", "")
    return table


def _reasons(out: dict[str, str]) -> str | None:
    return "\n".join(f'{task} is not in "all": {reason}' for task, reason in out.items()) or None


def group_table(results: Sequence[TaskResult]) -> Table:
    """Mean scores of the groups of every task; no rows if no task has groups."""
    names = list(results[0].answers)
    table = Table(title="Scores by group")
    for heading in ("task", "group", *names):
        table.add_column(heading, justify="left" if heading in ("task", "group") else "right")
    for result in results:
        for group in group_scores(result, "ar"):
            table.add_row(result.task.name, group, *(f"{group_scores(result, n)[group]:.3f}" for n in names))
        table.add_section()
    return table


def speed_table(results: Sequence[TaskResult]) -> Table:
    """Medians and quartiles of the rounds, with the mean gain over the tasks that count; starred gains do not count."""
    table = Table(title="Speed without prefill: medians (quartiles)", pad_edge=False)  # fits 80 columns
    for heading in ("task", "prompts", "batch", "mode", "tokens/s", "times ar", "prefill,\nms per\nprompt"):
        table.add_column(heading, justify="left" if heading in ("task", "mode") else "right", overflow="fold")
    sizes: dict[int, None] = {}
    uncounted = False
    for result in results:
        if not result.timed:
            table.add_row(result.task.name, "0", "", "", "not timed: ar scores 0")
        for size, examples in result.timed.items():
            sizes[size] = None
            if not examples:
                why = f"not timed: sound answers in every mode to fewer than {size}"
                table.add_row(result.task.name, "0", str(size), "", why)
                continue
            by_name = result.speeds[size]
            for name, speed in by_name.items():
                prefill = _number(1e3 * speed.prefill_seconds.median / len(examples), 2)
                mark = "" if name == "ar" or gain_counts(result, name) else "*"
                uncounted = uncounted or bool(mark)
                parts = (_spread(speed.tokens_per_second, 0), _spread(speed.gain, 2) + mark, prefill)
                table.add_row(result.task.name, str(len(examples)), str(size), name, *parts)
            for name in (name for name in result.answers if name not in by_name):
                table.add_row(result.task.name, "", str(size), name, "not timed: most answers degenerate or empty")
        table.add_section()
    for size in sizes:
        for name in results[0].answers:
            counted = tasks_in_gain(results, name, size)
            if name != "ar" and counted:
                label = f"all: {', '.join(counted)}"
                table.add_row(label, "", str(size), name, "", _number(total_gain(results, name, size), 2), "")
    if uncounted:
        table.caption = UNCOUNTED
        table.caption_justify = "left"
    return table


def share(found: Interval) -> str:
    """A retention as text: in per cent with its interval, or the reason why it is undefined."""
    if found.value is None:
        return f"{_UNDEFINED}: ar scores 0"
    if found == (1, 1, 1):  # only if no answer differs from ar's
        return "100.0% (identical texts)"
    if found.low is None or found.high is None:
        return f"{found.value:.1%} (interval {_UNDEFINED}: too few questions, or ar scores too little)"
    return f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"


def _spread(values: tuple[float, float, float], digits: int) -> str:
    low, median, high = values
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
