"""`twotower bench serve`: load on an OpenAI endpoint, and what its users would have seen."""

import asyncio
import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.cli.load_test.plan import LoadTest, Mixes, Target, parse_mix, plan
from twotower.cli.load_test.report import Goal, LoadReading, report, row
from twotower.training.corpus.text import read_lines


def command(
    url: Annotated[str, typer.Option(help="Address of the API, with its /v1.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="What the endpoint calls the model.", show_default="the first it lists")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use chat completions instead of completions.")] = False,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: requests unfinished at a time, several with commas.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop: requests per second by a Poisson process, several with commas.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests at each load, 1 or more.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before them that are not measured, 0 or more.")] = 2,
    prompt_words: Annotated[str, typer.Option(help="Words of a prompt; 32:3,128:1 is a mix of 3 to 1.")] = "32",
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Take prompts from the lines of a file instead of random words."
        ),
    ] = None,
    new_tokens: Annotated[str, typer.Option(help="Tokens that a request asks for; 16:1,128:1 is a mix.")] = "64",
    modes: Annotated[
        str | None,
        typer.Option(help="Decoding modes, as in ar:3,diffusion:1; twotower's servers only.", show_default="not sent"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask to write on after an end token; not every server knows it.")
    ] = False,
    ttft_goal: Annotated[float, typer.Option(min=0.0, help="Most ms to the first token of a good request.")] = 1000.0,
    tpot_goal: Annotated[float, typer.Option(min=0.0, help="Most ms for each token after it.")] = 100.0,
    seed: Annotated[int, typer.Option(min=0, help="Repeats the requests and their arrivals.")] = 0,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte after which a request failed.")
    ] = 120.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key that requests carry.", show_default="none")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Directory for every request's readings and a picture.")
    ] = None,
) -> None:
    """Print one JSON line per load. Give --concurrency for a closed loop or --rate for an open one.

    Times count from when a request was due. Run it on another machine than the server where you can.
    """
    if (concurrency is None) == (rate is None):
        raise ValueError("give either --concurrency (closed loop) or --rate (open loop)")
    needed = ["httpx", "matplotlib"] if out is not None else ["httpx"]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"the load tool needs {', '.join(missing)}; pip install 'twotower[bench]'")
    from twotower.cli.load_test.client import find_model

    loads = _loads("rate", rate, float) if rate is not None else _loads("concurrency", concurrency or "", int)
    mixes = Mixes(
        parse_mix("prompt_words", prompt_words, integers=True),
        parse_mix("new_tokens", new_tokens, integers=True),
        [] if modes is None else parse_mix("modes", modes, integers=False),
        [] if prompts is None else [line for line in read_lines(prompts) if line.strip()],
    )
    if prompts is not None and not mixes.prompts:
        raise ValueError(f"{prompts} has no lines; put one prompt on each")
    goal = Goal(first_token=ttft_goal / 1e3, per_token=tpot_goal / 1e3)
    rates = {load: float(load) if rate is not None else None for load in loads}
    url = url.rstrip("/")
    name = model or find_model(url, api_key, timeout)
    test = LoadTest(
        target=Target(url, name, "chat" if chat else "completions", temperature, ignore_eos),
        warmup=plan(mixes, warmup, rate=None, seed=seed + 2),
        loads={load: plan(mixes, requests, rate=per_second, seed=seed) for load, per_second in rates.items()},
        is_open=rate is not None,
    )
    results = asyncio.run(_measured(test, api_key, timeout))
    conditions = {
        "url": url,
        "model": name,
        "endpoint": test.target.endpoint,
        "prompt_words": prompt_words if prompts is None else str(prompts),
        "new_tokens": new_tokens,
        "mix_of_modes": modes,
        "temperature": temperature,
        "ignore_eos": ignore_eos,
        "seed": seed,
    }
    figures = [report(readings, goal) for readings in results.values()]
    for load, found in zip(loads, figures, strict=True):
        print(json.dumps({"rate" if rate is not None else "concurrency": float(load)} | found | conditions))
    if out is not None:
        _write(out, test, results, figures)


async def _measured(test: LoadTest, api_key: str | None, timeout: float) -> dict[str, list[LoadReading]]:
    """Every load's readings, one load after the other; a progress bar on stderr where that is a terminal."""
    from twotower.cli.load_test.client import client, run_closed, run_open

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results = {}
    async with client(api_key, timeout) as http:
        await run_closed(http, test.target, test.warmup, 1, lambda: None)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            for load, shots in test.loads.items():
                task = progress.add_task(load, total=len(shots))
                tick = functools.partial(progress.advance, task)
                if test.is_open:
                    results[load] = await run_open(http, test.target, shots, tick)
                else:
                    results[load] = await run_closed(http, test.target, shots, int(load), tick)
    return results


def _write(
    out: Path, test: LoadTest, results: Mapping[str, Sequence[LoadReading]], figures: Sequence[dict[str, Any]]
) -> None:
    """requests.jsonl with one line per request, and load.png."""
    from twotower.cli.load_test.plot import draw

    out.mkdir(parents=True, exist_ok=True)
    axis = "requests due per second" if test.is_open else "requests at a time"
    lines = [json.dumps({"load": load} | row(r)) for load, readings in results.items() for r in readings]
    (out / "requests.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(results, figures, axis, out / "load.png")


def _loads(name: str, text: str, kind: type[int] | type[float]) -> list[str]:
    """The loads of a comma-separated option, as they were written. Raises ValueError for any that is not above 0."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        try:
            value = kind(part)
        except ValueError as error:
            raise ValueError(f"{name} is {text!r}, must be numbers with commas, such as 1,4,16") from error
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {text!r}, must be above 0")
    return parts
