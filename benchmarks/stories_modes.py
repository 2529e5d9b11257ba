"""Measures speed and quality of `ar`, `diffusion` and `verified` on the shipped stories checkpoint.

    python benchmarks/stories_modes.py [--model PATH] [--threshold 0.8] [--draft 16]

Prints one JSON line. 50 held-out prompts of 32 tokens (stories_prompts.json, sampled from the context tower with seeds
that training never used) are continued greedily at batch 1, up to the end of the story or 192 new tokens: after the end
most texts go on with the one story that the denoiser knows by heart. The modes alternate prompt by prompt. Ratios are
of tokens per second, and their medians over prompts are printed. `nll` is the negative log-likelihood of each mode's
text under the context tower, in nats per token, and `nll_minus_ar` what the mode loses against greedy `ar`.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

import twotower
from twotower.origin import commit, cpu_model

PROMPTS = Path(__file__).with_name("stories_prompts.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--draft", type=int, default=16, help="longest draft of `verified`, which adapts")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=192)
    arguments = parser.parse_args()
    model = twotower.load(arguments.model)
    most = arguments.new_tokens
    modes = {
        "ar": twotower.SamplingParams(mode="ar", max_new_tokens=most),
        "diffusion": twotower.SamplingParams(
            mode="diffusion", confidence_threshold=arguments.threshold, max_new_tokens=most
        ),
        "verified": twotower.SamplingParams(mode="verified", block_size=arguments.draft, max_new_tokens=most),
    }
    prompts = json.loads(PROMPTS.read_text())[: arguments.prompts]
    runs: dict[str, list[twotower.Generation]] = {name: [] for name in modes}
    for params in modes.values():
        twotower.generate(model, [prompts[0]], params)  # warm-up
    for prompt in prompts:
        for name, params in modes.items():
            runs[name] += twotower.generate(model, [prompt], params)
    speeds = {name: [len(g.token_ids) / g.stats.seconds_total for g in done] for name, done in runs.items()}
    out: dict[str, object] = {"benchmark": "stories_modes", "prompts": len(prompts)}
    ar_nll = None
    for name, done in runs.items():
        scores = twotower.score(model, [g.token_ids for g in done], prompts)
        nll = -statistics.mean(own.total / len(own.token_ids) for own in scores)
        ar_nll = nll if ar_nll is None else ar_nll
        tokens = sum(len(g.token_ids) for g in done)
        denoiser = sum(g.stats.denoiser_calls for g in done)
        context = sum(g.stats.context_calls - 1 for g in done)  # without prefill
        ratios = [mine / ar for mine, ar in zip(speeds[name], speeds["ar"], strict=True)]
        out[name] = {
            "tokens": tokens,
            "tokens_per_second": round(statistics.median(speeds[name]), 1),
            "tokens_per_second_quartiles": [round(q, 1) for q in statistics.quantiles(speeds[name], n=4)[::2]],
            "ratio_to_ar": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
            "tokens_per_nfe": round(tokens / denoiser, 3) if denoiser else None,
            "tokens_per_context_call": round(tokens / context, 3) if context else None,
            "tokens_per_pass": round(tokens / (denoiser + context), 3),
            "nll": round(nll, 4),
            "nll_minus_ar": round(nll - ar_nll, 4),
            "equal_to_ar": sum(a.token_ids == g.token_ids for a, g in zip(runs["ar"], done, strict=True)),
        }
    out |= {
        "threshold": arguments.threshold,
        "draft": arguments.draft,
        "dtype": str(next(iter(model.parameters())).dtype),
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
