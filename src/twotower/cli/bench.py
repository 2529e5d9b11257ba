"""`twotower bench`: `decode` measures the modes, beside the time that reading their weights takes; `serve` a server."""

import json
import statistics
from typing import Annotated, Any, NamedTuple, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.cli import bench_serve
from twotower.cli.measuring import DrafterOption, check_read, drafter_ways, listed_modes
from twotower.cli.options import DeviceOption, DtypeOption, ModelOption, open_model
from twotower.cli.settings import like
from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.output import DraftCount, add_drafts, draft_counts
from twotower.decoding.params import DEFAULT_THRESHOLD, SamplingParams
from twotower.eval.evaluate import FEWEST_REPEATS
from twotower.eval.judging import is_degenerate
from twotower.eval.provenance import provenance
from twotower.eval.throughput import Speed, Timed, Work, clock, speeds
from twotower.model.two_tower import TwoTower
from twotower.planning.footprint import pass_bytes, released_tensors

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_PROBE_BYTES = 256 * 1024 * 1024  # beyond any cache


class Calls(NamedTuple):
    """New tokens of one mode over all prompts, its forward passes besides the prefills, the milliseconds of one, and
    what its drafts gave.

    Milliseconds are None where there are no passes, `degenerate` texts where there is no tokenizer to read them with.
    """

    tokens: int
    degenerate: int | None
    denoiser: int
    context: int
    ms_per_denoiser_call: float | None
    ms_per_context_call: float | None
    drafts: tuple[DraftCount, ...]


app.command("serve")(bench_serve.command)


@app.callback()
def group() -> None:
    """Measure speed."""


@app.command("decode")
def decode(
    model: ModelOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts, 1 or more; each runs alone.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, 1 or more.")] = 32,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens written after each, 1 or more; an end token ends a text before.")
    ] = 128,
    modes: Annotated[str, typer.Option(help="Modes to measure, with commas; ar always runs.")] = ",".join(MODES),
    past_positions: Annotated[bool, like(SamplingParams, "past_positions")] = False,
    block_size: Annotated[int | None, like(SamplingParams, "block_size")] = None,
    threshold: Annotated[float, like(SamplingParams, "confidence_threshold")] = DEFAULT_THRESHOLD,
    drafter: DrafterOption = None,
    repeats: Annotated[
        int,
        typer.Option(min=FEWEST_REPEATS, help=f"Rounds in which the modes take turns, {FEWEST_REPEATS} or more."),
    ] = FEWEST_REPEATS,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Print one JSON line per mode: greedy decoding at batch 1 after prompts that the model sampled itself.

    Speeds and ratios to ar are without prefill, and medians with quartiles over rounds, ratios within a round. The
    floor is the bytes of weights that a mode's passes read, divided by the memory bandwidth measured between the runs.
    "degenerate" says how many texts fall into a loop: they are quicker to write than what one would want to read. Modes
    may end their texts after different numbers of "tokens": twotower eval times those of sound answers alone.
    """
    listed = listed_modes(modes)
    check_read(listed, "verified", drafter=drafter)
    settings: dict[str, SamplingParams] = {
        f"{mode} {label}".strip(): SamplingParams(
            mode=mode,
            max_new_tokens=new_tokens,
            block_size=block_size,
            confidence_threshold=threshold,
            temperature=0.0,
            past_positions=past_positions,
            **fields,
        )
        for mode in listed
        for label, fields in drafter_ways(mode, drafter).items()
    }
    opened = open_model(model, device=device, dtype=dtype)
    settings = {name: params.settled(opened.config.block_size, opened.sampling) for name, params in settings.items()}
    texts = sample_prompts(opened, prompts, prompt_tokens)
    found, bandwidth = _measure(opened, texts, settings, repeats)
    conditions = {
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "block_size": block_size or opened.config.block_size,
        "confidence_threshold": threshold,
        "repeats": repeats,
        "bandwidth_gb_s": bandwidth / 1e9,
        "model": model or "stories",
        **provenance(opened),
    }
    for name, params in settings.items():
        calls = count_calls(opened, texts, params)
        floor = floor_seconds(opened, params, calls, bandwidth)
        own = {"mode": params.mode, "drafter": params.drafter}
        print(json.dumps(own | _results(found[name], calls, floor, prompts) | conditions), flush=True)


def _results(speed: Speed, calls: Calls, floor: float, prompts: int) -> dict[str, Any]:
    """One mode's numbers; counts and seconds are means per prompt."""
    seconds = calls.tokens / speed.tokens_per_second.median
    return {
        "tokens_per_second": speed.tokens_per_second._asdict(),
        "ratio_to_ar": speed.gain._asdict(),
        "prefill_seconds": speed.prefill_seconds.median / prompts,
        "tokens": calls.tokens / prompts,
        "degenerate": calls.degenerate,
        "nfe": calls.denoiser / prompts,
        "context_calls": calls.context / prompts,
        "tokens_per_nfe": calls.tokens / calls.denoiser if calls.denoiser else None,
        "drafts": draft_counts(calls.drafts),
        "tokens_per_pass": calls.tokens / (calls.denoiser + calls.context) if calls.denoiser + calls.context else None,
        "ms_per_nfe": calls.ms_per_denoiser_call,
        "ms_per_context_call": calls.ms_per_context_call,
        "floor_seconds": floor / prompts,
        "ratio_to_floor": seconds / floor if floor else None,
    }


def sample_prompts(model: TwoTower, count: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens, the first being BOS, that the context tower samples at temperature 1."""
    bos = model.config.bos_token_id
    if bos is None:
        raise ValueError("the config has no bos_token_id to start prompts from; measure another checkpoint")
    params = [
        SamplingParams(
            mode="ar", max_new_tokens=length - 1, temperature=1.0, seed=seed, ignore_eos=True, past_positions=True
        )
        for seed in range(count)
    ]
    return [[bos, *done.token_ids] for done in generate(model, [[bos]] * count, params)]


def count_calls(model: TwoTower, prompts: list[list[int]], params: SamplingParams) -> Calls:
    """Counts and times the calls of each prompt in a run of its own; measured runs have no clock around calls."""
    timed = Timed(model)
    done = [generate(cast(TwoTower, timed), [prompt], params)[0] for prompt in prompts]
    texts = [one.text for one in done if one.text is not None]
    denoiser = sum(one.stats.denoiser_calls for one in done)
    context = sum(one.stats.context_calls - 1 for one in done)
    return Calls(
        tokens=sum(one.stats.num_tokens for one in done),
        degenerate=sum(map(is_degenerate, texts)) if texts else None,
        denoiser=denoiser,
        context=context,
        ms_per_denoiser_call=1e3 * timed.seconds["denoise"] / denoiser if denoiser else None,
        ms_per_context_call=1e3 * timed.seconds["extend"] / context if context else None,
        drafts=add_drafts((), (count for one in done for count in one.stats.drafts)),
    )


def floor_seconds(model: TwoTower, params: SamplingParams, calls: Calls, bandwidth: float) -> float:
    """Seconds that reading the weights of all passes takes at `bandwidth` bytes per second.

    A draft of `verified` counts as a whole block. Only ar and verified need logits of their context passes.
    """
    config = model.config
    block_size = params.block_size or config.block_size
    tensors = released_tensors(config, model.context_tower.embeddings.dtype)
    denoiser_tokens = 1 if params.mode == "mock_ar" else block_size
    context_tokens = 1 if params.mode in ("ar", "mock_ar") else block_size
    needs_logits = params.mode in ("ar", "verified")
    denoiser = pass_bytes(config, tensors, "denoiser", denoiser_tokens, head=True)
    context = pass_bytes(config, tensors, "context", context_tokens, head=needs_logits)
    return (calls.denoiser * denoiser + calls.context * context) / bandwidth


def _measure(
    model: TwoTower, prompts: list[list[int]], settings: dict[str, SamplingParams], repeats: int
) -> tuple[dict[str, Speed], float]:
    """Every mode's speed, and the memory bandwidth between its runs in bytes per second."""
    probe = torch.zeros(_PROBE_BYTES // 4, device=model.context_device)
    bandwidths = []
    console = Console(stderr=True)
    columns = (TextColumn("Measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A bar that redraws by itself would take time from the runs.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=(repeats + 1) * len(settings))

        def advance() -> None:
            bandwidths.append(_PROBE_BYTES / clock(model, probe.sum)[0])
            progress.advance(bar)
            progress.refresh()

        work = Work(prompts, {mode: [params] * len(prompts) for mode, params in settings.items()}, 1)
        found = speeds(model, work, repeats, advance)
    return found, statistics.median(bandwidths)
