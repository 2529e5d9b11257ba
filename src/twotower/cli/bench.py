"""`twotower bench`; `decode` sets the modes against each other and against the floor of reading the weights."""

import json
import statistics
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.cli import bench_serve
from twotower.cli.accounting import pass_bytes, released_tensors
from twotower.cli.options import DeviceOption, DtypeOption, ModelOption, open_model
from twotower.decoding.generate import generate
from twotower.decoding.params import MODES, Generation, Mode, SamplingParams
from twotower.eval.provenance import machine
from twotower.eval.throughput import Timed, clock
from twotower.model.two_tower import TwoTower

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULTS = SamplingParams()
_PROBE_BYTES = 256 * 1024 * 1024  # beyond any cache


class Sample(NamedTuple):
    """One mode over all prompts, once."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Rounds(NamedTuple):
    """Every mode's samples, one per round, and the median of the rounds' bandwidths in bytes per second."""

    samples: dict[str, list[Sample]]
    bandwidth: float


class Calls(NamedTuple):
    """Forward passes of one mode over all prompts, and the milliseconds of one; None where there are none."""

    denoiser: int
    context: int
    ms_per_denoiser_call: float | None
    ms_per_context_call: float | None


app.command("serve")(bench_serve.command)


@app.callback()
def group() -> None:
    """Measure speed."""


@app.command("decode")
def decode(
    model: ModelOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts, 1 or more; each runs alone.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, 1 or more.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written after each, 1 or more.")] = 128,
    modes: Annotated[str, typer.Option(help="Modes to measure, with commas; ar always runs.")] = ",".join(MODES),
    block_size: Annotated[int, typer.Option(help="Tokens filled together, 1 or more.")] = _DEFAULTS.block_size,
    threshold: Annotated[
        float, typer.Option(help="A token above this probability is fixed at once, 0 to 1.")
    ] = _DEFAULTS.confidence_threshold,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which the modes take turns, 1 or more.")] = 3,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Print one JSON line per mode: greedy decoding at batch 1 after prompts that the model sampled itself.

    Ratios to ar compare runs of the same round; the floor is the bytes of weights that a mode's passes read, divided by
    the memory bandwidth measured in the same rounds. Medians over the rounds.
    """
    chosen = dict.fromkeys(["ar", *modes.split(",")])
    settings = {
        mode: SamplingParams(
            mode=cast(Mode, mode),
            max_new_tokens=new_tokens,
            block_size=block_size,
            confidence_threshold=threshold,
            ignore_eos=True,
        )
        for mode in chosen
    }
    opened = open_model(model, device=device, dtype=dtype)
    texts = sample_prompts(opened, prompts, prompt_tokens)
    rounds = _rounds(opened, texts, settings, repeats)
    conditions = {
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "block_size": block_size,
        "confidence_threshold": threshold,
        "repeats": repeats,
        "bandwidth_gb_s": rounds.bandwidth / 1e9,
        "machine": machine(opened),
        "torch": torch.__version__,
        "dtype": str(opened.context_tower.embeddings.dtype).removeprefix("torch."),
        "model": model or "stories",
    }
    for params in settings.values():
        print(json.dumps(_results(opened, texts, params, rounds) | conditions), flush=True)


def _results(model: TwoTower, prompts: list[list[int]], params: SamplingParams, rounds: Rounds) -> dict[str, Any]:
    """One mode's numbers; counts and seconds are means per prompt."""
    calls = count_calls(model, prompts, params)
    own = rounds.samples[params.mode]
    speeds = [sample.tokens_per_second for sample in own]
    ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(own, rounds.samples["ar"], strict=True)]
    floor = floor_seconds(model, params, calls, rounds.bandwidth)
    tokens = len(prompts) * params.max_new_tokens
    return {
        "mode": params.mode,
        "tokens_per_second": statistics.median(speeds),
        "spread": [min(speeds), max(speeds)],
        "nfe": calls.denoiser / len(prompts),
        "context_calls": calls.context / len(prompts),
        "tokens_per_nfe": tokens / calls.denoiser if calls.denoiser else None,
        "ms_per_nfe": calls.ms_per_denoiser_call,
        "ms_per_context_call": calls.ms_per_context_call,
        "ratio_to_ar": statistics.median(ratios),
        "floor_seconds": floor / len(prompts),
        "ratio_to_floor": statistics.median(sample.seconds for sample in own) / floor,
    }


def sample_prompts(model: TwoTower, count: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens, the first being BOS, that the context tower samples at temperature 1."""
    bos = model.config.bos_token_id
    if bos is None:
        raise ValueError("the config has no bos_token_id to start prompts from; measure another checkpoint")
    params = [
        SamplingParams(mode="ar", max_new_tokens=length - 1, temperature=1.0, seed=seed, ignore_eos=True)
        for seed in range(count)
    ]
    return [[bos, *done.token_ids] for done in generate(model, [[bos]] * count, params)]


def count_calls(model: TwoTower, prompts: list[list[int]], params: SamplingParams) -> Calls:
    """Runs each prompt once more with a clock around every call, which the measured runs are spared."""
    timed = Timed(model)
    stats = [done.stats for done in _each_alone(cast(TwoTower, timed), prompts, params)]
    denoiser, context = sum(s.denoiser_calls for s in stats), sum(s.context_calls for s in stats)
    steps = context - len(prompts)  # a prefill counts as one context call, but reads many tokens
    return Calls(
        denoiser,
        context,
        1e3 * timed.seconds["denoise"] / denoiser if denoiser else None,
        1e3 * timed.seconds["extend"] / steps if steps else None,
    )


def floor_seconds(model: TwoTower, params: SamplingParams, calls: Calls, bandwidth: float) -> float:
    """Seconds that reading the weights of all passes takes at `bandwidth` bytes per second.

    A prefill counts as a context pass like the others, and a draft of `verified` as a whole block. Only ar and verified
    need logits of their context passes.
    """
    config = model.config
    tensors = released_tensors(config, model.context_tower.embeddings.dtype)
    denoiser_tokens = 1 if params.mode == "mock_ar" else params.block_size
    context_tokens = 1 if params.mode in ("ar", "mock_ar") else params.block_size
    needs_logits = params.mode in ("ar", "verified")
    denoiser = pass_bytes(config, tensors, "denoiser", denoiser_tokens, head=True)
    context = pass_bytes(config, tensors, "context", context_tokens, head=needs_logits)
    return (calls.denoiser * denoiser + calls.context * context) / bandwidth


def _rounds(model: TwoTower, prompts: list[list[int]], settings: dict[str, SamplingParams], repeats: int) -> Rounds:
    """`repeats` rounds in which the modes take turns, after one to warm up."""
    probe = torch.zeros(_PROBE_BYTES // 4, device=model.context_device)
    samples: dict[str, list[Sample]] = {mode: [] for mode in settings}
    bandwidths = []
    console = Console(stderr=True)
    columns = (TextColumn("Measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A bar that redraws by itself would take time from the runs.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=(repeats + 1) * len(settings))
        for i in range(repeats + 1):
            for mode, params in settings.items():
                sample = _sample(_each_alone(model, prompts, params))
                if i > 0:
                    samples[mode].append(sample)
                progress.advance(task)
                progress.refresh()
            bandwidths.append(_PROBE_BYTES / clock(model, probe.sum)[0])
    return Rounds(samples, statistics.median(bandwidths[1:]))


def _each_alone(model: TwoTower, prompts: list[list[int]], params: SamplingParams) -> list[Generation]:
    return [generate(model, [prompt], params)[0] for prompt in prompts]


def _sample(done: Iterable[Generation]) -> Sample:
    stats = [one.stats for one in done]
    return Sample(sum(s.num_tokens for s in stats), sum(s.seconds_total for s in stats))
