"""`twotower generate`: continue prompts from the command line, a JSON-lines file or stdin."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twotower.cli.batch import FileRequest, record, write_batch
from twotower.cli.live import show
from twotower.cli.options import (
    ContextDeviceOption,
    DenoiserDeviceOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    open_model,
)
from twotower.cli.settings import with_settings
from twotower.decoding.generate import generate, stream
from twotower.decoding.params import SamplingParams
from twotower.engine.config import MIB, EngineConfig
from twotower.model.two_tower import TwoTower

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_LIMITS = EngineConfig()
_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}


@app.command("generate")
@with_settings
def command(
    prompt: Annotated[
        str | None,
        typer.Argument(help='Text to continue; "" starts from nothing.', show_default="--file, else stdin"),
    ] = None,
    *,
    model: ModelOption = None,
    file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='Continue every line of a JSON-lines file: {"prompt": text or token ids}, and for that line alone any '
            'setting under its name with underscores, such as "max_new_tokens".',
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="With --file: write one JSON object per line there, in order, many prompts at a time, as mode auto "
            "needs it. Lines that it has are kept: call it again after an interruption.",
        ),
    ] = None,
    params: SamplingParams,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    context_device: ContextDeviceOption = None,
    denoiser_device: DenoiserDeviceOption = None,
    max_num_requests: Annotated[
        int, typer.Option(help="With --out: prompts at a time, 1 or more.")
    ] = _LIMITS.max_num_requests,
    state_mib: Annotated[
        int | None,
        typer.Option(
            help="With --out: MiB for the states of those prompts, 1 or more.", show_default="a share of what is free"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prompt, and nothing else on stdout.")
    ] = False,
    live: Annotated[
        bool | None,
        typer.Option("--live/--no-live", help="Draw each step, or only print the text.", show_default="in a terminal"),
    ] = None,
) -> None:
    """Continue a prompt, every prompt of a file, or what stdin holds."""
    if as_json and live:
        raise ValueError("--json and --live exclude each other; drop one of them")
    if out is not None and file is None:
        raise ValueError("--out needs --file, a JSON-lines file of prompts; without one, redirect what --json prints")
    if out is not None and (as_json or live):
        raise ValueError("--out writes a file and shows its progress; drop --json and --live")
    jobs = _jobs(prompt, file, params)
    if out is None and not as_json and any(job.params.logprobs for job in jobs):
        raise ValueError("--logprobs are written by --json and --out alone; add one of them")
    opened = open_model(
        model, device=device, dtype=dtype, context_device=context_device, denoiser_device=denoiser_device
    )
    if out is not None:
        limits = EngineConfig(
            max_num_requests=max_num_requests,
            state_bytes=None if state_mib is None else state_mib * MIB,
        )
        write_batch(opened, jobs, out, limits)
        return
    watched = not as_json and (sys.stdout.isatty() if live is None else live)
    for i, job in enumerate(jobs):
        if as_json:
            result = generate(opened, [job.prompt], job.params)[0]
            print(json.dumps(record(job, result), ensure_ascii=False), flush=True)
            continue
        if i > 0:
            print()
        if watched:
            show(opened, job.prompt, job.params, Console())
        else:
            _print_text(opened, job)


def _print_text(model: TwoTower, job: FileRequest) -> None:
    for piece in stream(model, job.prompt, job.params):
        # without a tokenizer there is no text
        shown = str(piece) if model.tokenizer is not None else "".join(f"{i} " for i in piece.token_ids)
        print(shown, end="", flush=True)
    print()


def _jobs(prompt: str | None, file: Path | None, params: SamplingParams) -> list[FileRequest]:
    if prompt is not None and file is not None:
        raise ValueError("both a prompt and --file were given; drop one of them")
    if file is not None:
        # Bytes, whose lines end where JSON's do: a text's also end at U+2028, which may stand in a string
        lines = enumerate(file.read_bytes().splitlines(), start=1)
        return [_job(line, f"{file} line {number}", params) for number, line in lines if line.strip()]
    if prompt is None:
        if sys.stdin.isatty():
            raise ValueError(
                'there is no prompt; write it after the command, as in twotower generate "Once upon a time"'
            )
        prompt = sys.stdin.read().removesuffix("\n")
    return [FileRequest(prompt, params)]


def _job(line: bytes, where: str, params: SamplingParams) -> FileRequest:
    try:
        raw = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(raw, dict) or "prompt" not in raw:
        raise ValueError(f'{where} must be an object with a prompt; write {{"prompt": "…"}}')
    prompt = raw.pop("prompt")
    is_ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if not is_ids and not isinstance(prompt, str):
        raise ValueError(f"{where} has a prompt that is neither a text nor a list of token ids")
    unknown = sorted(set(raw) - _FIELDS)
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; besides prompt there are {sorted(_FIELDS)}")
    try:
        return FileRequest(prompt, dataclasses.replace(params, **raw))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
