"""Many prompts from the command line: results as JSON lines, in order, kept over interruptions."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.decoding.output import Generation, draft_counts
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import Prompt
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.model.two_tower import TwoTower


class FileRequest(NamedTuple):
    prompt: Prompt
    params: SamplingParams


def record(job: FileRequest, result: Generation) -> dict[str, Any]:
    """The object that `--json` and `--out` write."""
    stats = result.stats
    return {
        "prompt": job.prompt,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "mode": job.params.mode,
        **dataclasses.asdict(stats),
        "drafts": draft_counts(stats.drafts),
        "tokens_per_denoiser_call": stats.tokens_per_denoiser_call,
        "tokens_per_pass": stats.tokens_per_pass,
        "tokens_per_second": stats.num_tokens / stats.seconds_total if stats.seconds_total else 0.0,
        "commit_steps": result.commit_steps,
        "confidences": result.confidences,
        **({"top": result.top} if job.params.logprobs else {}),
    }


def write_batch(model: TwoTower, jobs: Sequence[FileRequest], out: Path, limits: EngineConfig) -> None:
    """Adds a line to `out` for every job that has none yet, in order.

    Raises ValueError where the lines there belong to other prompts, or, before anything runs, for a bad job.
    """
    engine = Engine(model, limits)
    done = _finished(jobs, out)
    requests = [engine.prepare(job.prompt, job.params) for job in jobs[done:]]
    console = Console(stderr=True)
    columns = (
        TextColumn("Generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts"),
        TimeRemainingColumn(),
    )
    with (
        out.open("a", encoding="utf-8") as file,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=len(jobs), completed=done)
        for job, result in zip(jobs[done:], engine.run(requests), strict=True):
            file.write(json.dumps(record(job, result), ensure_ascii=False) + "\n")
            file.flush()
            progress.advance(task)
    console.print(f"{out} holds the results of {len(jobs)} prompts", soft_wrap=True, highlight=False)


def _finished(jobs: Sequence[FileRequest], out: Path) -> int:
    """How many jobs have their line; a line that an interruption cut off is removed."""
    if not out.exists():
        return 0
    lines = out.read_bytes().split(b"\n")
    if lines.pop():
        with out.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{out} line {number} is not a result; name another file, or delete it") from error
        if number > len(jobs) or prompt != jobs[number - 1].prompt:
            raise ValueError(f"{out} line {number} belongs to another prompt; name another file, or delete it")
    return len(lines)
