"""Writes the tables of docs/measured.md from the files in benchmarks/results, so that no figure there is typed by hand.

    python benchmarks/result_tables.py [--check]

A table stands between `<!-- table: NAME FILE … -->` and `<!-- end of table -->`, where NAME is one of TABLES below and
the FILEs are in benchmarks/results. Everything between the two is replaced. With --check nothing is written, and it is
an error if the page would change.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "measured.md"
RESULTS = Path(__file__).with_name("results")
_PLACE = re.compile(r"(<!-- table: (\w+) ([^>]*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Result = dict[str, Any]


def rendered(page: str, results: Path = RESULTS) -> str:
    """The text of the page with every table written again. Raises ValueError for an unknown table or file."""

    def table(place: re.Match[str]) -> str:
        opening, name, files, closing = place.groups()
        if name not in TABLES:
            raise ValueError(f"the page asks for table {name!r}, must be one of {', '.join(TABLES)}")
        missing = [file for file in files.split() if not (results / file).exists()]
        if missing:
            raise ValueError(f"table {name} is made of {missing[0]}, which is not in {results}")
        loaded = [json.loads((results / file).read_text(encoding="utf-8")) for file in files.split()]
        return f"{opening}{TABLES[name](loaded)}\n{closing}"

    return _PLACE.sub(table, page)


def stories_modes(results: list[Result]) -> str:
    """From benchmarks/stories_modes.py: speed and likelihood of the modes."""
    [result] = results
    rows = []
    for mode in ("ar", "diffusion", "verified"):
        own = result[mode]
        name = f"`{mode}`, γ {result['threshold']:g}" if mode == "diffusion" else f"`{mode}`"
        same = f", {own['equal_to_ar']} of {result['prompts']} texts equal to `ar`'s" if mode == "verified" else ""
        speed = spread(own["tokens_per_second"], own["tokens_per_second_quartiles"], 0)
        gain = "1" if mode == "ar" else spread(own["ratio_to_ar"], own["ratio_quartiles"], 2)
        rows.append([name, speed, gain, *_tokens_per(own), f"{own['nll']:.3f}{same}"])
    header = ["mode", "tokens/s", "times `ar`", "tokens per NFE", "tokens per pass", "NLL, nats per token"]
    return f"{markdown(header, rows)}\n\n{origin('python benchmarks/stories_modes.py', result)}"


def hybrid_decode(results: list[Result]) -> str:
    """From benchmarks/hybrid_decode.py, a file per dtype: passes beside their floors and other implementations."""
    rows = []
    for result in results:
        for key, name in (("ar", "one `ar` step"), ("nfe", "one NFE of 16")):
            own = result[key]
            others = [own.get(f"times_faster_than_{other}") for other in ("reference", "transformers")]
            rows.append(
                [
                    f"{name}, {result['dtype']}",
                    spread(own["ms"], own["ms_quartiles"], 1),
                    f"{own['ratio_to_larger_floor']:.1f}",
                    *("" if ratio is None else f"{ratio:.2f}" for ratio in others),
                ]
            )
    header = ["pass", "ms", "times the larger floor", "times as fast as PyTorch ops", "as transformers"]
    captions = [origin(f"python benchmarks/hybrid_decode.py --dtype {r['dtype']}", r) for r in results]
    return "\n\n".join([markdown(header, rows), "\n".join(captions)])


def training_pass(results: list[Result]) -> str:
    """From benchmarks/training_pass.py: speed and memory of training steps."""
    [result] = results
    names = {
        "seeded": "ours",
        "recompute": "ours, `--recompute`",
        "bf16": "ours, `--bf16`",
        "boundary": "boundary states, dense mask",
        "ar": "plain AR step of one tower",
    }
    rows = []
    for key, name in names.items():
        if key not in result:  # results older than this step
            continue
        rate = result[key]["tokens_per_cpu_second"]
        ratio = result.get(f"{key}_time_over_ar", {}).get("cpu")
        against = "" if ratio is None else spread(ratio["median"], [ratio["q1"], ratio["q3"]], 2)
        speed = spread(rate["median"], [rate["q1"], rate["q3"]], 0)
        peak = result["peak_mb"].get(key)
        rows.append([name, speed, against, "" if peak is None else f"{peak['median']:.0f}"])
    header = [f"step of {result['tokens']} tokens", "tokens per CPU second", "times the AR step's time", "peak MB"]
    command = "python benchmarks/training_pass.py --tokens 2048 --repeats 7 --scaling 1024 2048 4096 8192"
    return f"{markdown(header, rows)}\n\n{origin(command, result)}"


def _tokens_per(own: Result) -> list[str]:
    """New tokens per NFE, and per pass of either tower after prefill: 1 / (1/a + 1/b) of those per pass of each."""
    rates = [own["tokens_per_nfe"], own["tokens_per_context_call"]]
    passes = sum(1 / rate for rate in rates if rate)
    return ["" if rates[0] is None else f"{rates[0]:.2f}", f"{1 / passes:.2f}" if passes else ""]


def evaluation(results: list[Result]) -> str:
    """From `twotower eval --json`: the share of ar's score that each mode keeps, and its gain in speed."""
    [result] = results
    sizes = list(next(iter(result["overall"].values()))["gain"])
    rows = []
    for mode, overall in result["overall"].items():
        if mode == "ar":
            continue
        for task in overall["tasks_in_retention"]:
            own = result["tasks"][task]["settings"][mode]
            gains = [_quartiles(own["speed"].get(size, {}).get("gain"), 2) for size in sizes]
            rows.append([f"`{mode}`", task, _interval(own["retention"]), *gains, *_tokens_per(own)])
        if len(overall["tasks_in_retention"]) > 1:
            means = [_mean_gain(overall, size) for size in sizes]
            rows.append([f"`{mode}`", "all", _interval(overall["retention"]), *means, "", ""])
    header = [
        "mode",
        "task",
        "of `ar`'s score (95 %)",
        *(f"times `ar`, batch {size}" for size in sizes),
        "tokens per NFE",
        "tokens per pass",
    ]
    caption = origin(result["command"], result | result["machine"])
    for task, reason in result["overall"]["ar"]["tasks_left_out"].items():
        caption += f" {task} is left out: {reason}."
    return f"{markdown(header, rows)}\n\n{caption}"


def _mean_gain(overall: Result, size: str) -> str:
    """The mean gain over the tasks that count, with their names unless these are the tasks of the retention."""
    if overall["gain"][size] is None:
        return ""
    tasks = overall["tasks_in_gain"][size]
    of = "" if tasks == overall["tasks_in_retention"] else f" ({', '.join(tasks)})"
    return f"{overall['gain'][size]:.2f}{of}"


def evaluation_settings(results: list[Result]) -> str:
    """From `twotower eval --json` with several thresholds: each setting's score on every task and its gains at batch 1.

    The files are of the same run with different numbers of threads. Each has a column of gains; scores are the first's.
    """
    first = results[0]
    rows = []
    for setting, overall in first["overall"].items():
        scores = [f"{task['settings'][setting]['score']:.2f}" for task in first["tasks"].values()]
        measured = [result["overall"][setting]["gain"]["1"] for result in results]
        gains = ["" if gain is None else f"{gain:.2f}" for gain in measured]
        mode, *threshold = setting.split(" ", 1)
        kept = "" if setting == "ar" else _interval(overall["retention"])
        rows.append([" ".join([f"`{mode}`", *threshold]), *scores, kept, *gains])
    threads = [_threads(result["machine"]["threads"]) for result in results]
    header = ["mode", *first["tasks"], "of `ar`'s scores (95 %)", *(f"times `ar`, {count}" for count in threads)]
    captions = [origin(r["command"], r | r["machine"]).replace("medians with quartiles", "medians") for r in results]
    return "\n\n".join([markdown(header, rows), "\n".join(captions)])


def ablations(results: list[Result]) -> str:
    """From benchmarks/ablations.py: denoisers trained on the same tokens with one change each."""
    [result] = results
    names = {
        "base": "frozen context tower, separate denoiser",
        "tied": "one tower for both",
        "joint": "separate towers, both trained",
        "unseeded": "no seeding",
        "untimed": "no time conditioning",
        "curriculum": "blocks of 32, then 16",
        "distilled": "with distillation",
    }
    measures = {"loss": 3, "drafted_right": 3, "right": 3, "passes": 2, "ar_right": 3}
    rows = []
    for variant, name in names.items():
        own = result["variants"][variant]
        cells = [_plus_minus(own["values"][m], digits) for m, digits in measures.items()]
        against = "" if variant == "base" else _plus_minus(own["minus_base"]["right"], 3)
        rows.append([name, *cells[:3], against, *cells[3:]])
    header = [
        f"{result['tokens_per_run']:,} tokens each",
        "loss, t = 1",
        "first draft right",
        f"answers right, γ {result['threshold']:g}",
        "against the first line's",
        "NFEs per block",
        "`ar` right",
    ]
    caption = origin(result["command"], result | result["machine"]).replace(
        "medians with quartiles",
        f"means of {result['seeds']} seeds ± half of a 95 % t-interval, {result['answers']} answers",
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def levers(results: list[Result]) -> str:
    """From benchmarks/levers.py: objectives and masks, each for as many tokens from the same denoiser."""
    [result] = results
    measures = {"verified": 2, "drafted": 2, "diffusion": 2, "tokens_per_nfe": 2, "share": 3}
    start = result["untrained"]
    rows = [["where all start", "", *(f"{start[m]:.{digits}f}" for m, digits in measures.items()), ""]]
    for lever, expected in result["expected"].items():
        found = result["variants"][lever]
        gain = "" if lever == "base" else _plus_minus(found["minus_base"]["diffusion"], 2)
        cells = (_plus_minus(found["values"][m], digits) for m, digits in measures.items())
        rows.append([f"`{lever}`", expected, *cells, gain])
    header = [
        f"{result['tokens_per_run']:,} tokens each",
        "expected",
        "tokens per pass, `verified`",
        "per round",
        f"tokens per pass, `diffusion` γ {result['threshold']:g}",
        "per NFE",
        "share of `ar`'s right answers",
        "`diffusion` against `base`, seed by seed",
    ]
    seeds = f"means of {result['seeds']} seeds ± half of a 95 % t-interval" if result["seeds"] > 1 else "one seed"
    size = f"{start['bytes'] / 2**20:.1f} MB of weights"
    caption = origin(result["command"], result | result["machine"]).replace(
        "medians with quartiles", f"{seeds}, {result['answers']} answers, {size}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def training_law(results: list[Result]) -> str:
    """From benchmarks/training_law.py: what a denoiser gains by more tokens of training."""
    [result] = results
    rows = [
        [f"{p['tokens'] / 1e6:.1f} million", *(f"{p[m]:.{d}f}" for m, d in (("loss", 3), ("tokens_per_nfe", 2)))]
        for p in result["points"]
    ]
    told, law = f"{result['forecast']:.3f}", result["law"]
    if result["forecast_range"] is not None:
        told += " ({:.3f}–{:.3f})".format(*result["forecast_range"])
    size = f"{result['forecast_tokens'] / 1e6:,.0f} million, by the law"
    rows.append([size, told, f"{result['forecast_tokens_per_nfe']:.2f}"])
    header = ["tokens of training", "held-out bound, nats per token", f"tokens per NFE, γ {result['threshold']:g}"]
    formula = f"loss(n) = {law['floor']:.2f} + {law['scale']:.0f} · n^−{law['exponent']:.2f}"
    caption = origin(result["command"], result | result["machine"]).replace(
        "medians with quartiles", f"{result['held_out_rows']} rows; {formula}; in brackets without one of the points"
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def engine_load(results: list[Result]) -> str:
    """From benchmarks/engine_load.py: the speed of every mode by the number of requests that run at a time."""
    [result] = results
    found = result["speeds"]
    best = {"auto": found["auto_against_best"], "auto, loss allowed": found["lossy_auto_against_best"]}
    rows = []
    for mode, by_load in found["tokens_per_second"].items():
        cells = [f"{rate:,.0f}" for rate in by_load.values()]
        if mode in best:
            cells = [f"{cell} ({best[mode][n]['ratio']:.2f})" for cell, n in zip(cells, by_load, strict=True)]
        name, *rest = mode.split(",")
        rows.append([",".join([f"`{name}`", *rest]), *cells])
    loads = next(iter(found["tokens_per_second"].values()))
    header = ["tokens/s", *("one request" if n == "1" else f"{n} at a time" for n in loads)]
    caption = origin("python benchmarks/engine_load.py", result).replace("medians with quartiles", "medians")
    return f"{markdown(header, rows)}\n\n{caption}"


TABLES: dict[str, Callable[[list[Result]], str]] = {
    "stories_modes": stories_modes,
    "hybrid_decode": hybrid_decode,
    "training_pass": training_pass,
    "evaluation": evaluation,
    "evaluation_settings": evaluation_settings,
    "ablations": ablations,
    "levers": levers,
    "training_law": training_law,
    "engine_load": engine_load,
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(command: str, result: Result) -> str:
    """The line below a table, with command, commit and machine."""
    where = f"{result['cpu']}, {_threads(result['threads'])}"
    commit = "an unknown commit" if result["commit"] is None else result["commit"]
    return f"(`{command}`, {commit}, {where}, torch {result['torch']}; medians with quartiles)"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def spread(median: float, quartiles: list[float], digits: int) -> str:
    """A median with its quartiles."""
    low, high = quartiles
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _quartiles(found: dict[str, float] | None, digits: int) -> str:
    return "" if found is None else spread(found["median"], [found["q1"], found["q3"]], digits)


def _plus_minus(found: dict[str, float | None], digits: int) -> str:
    half = found["half_width_95"]
    return f"{found['mean']:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def _interval(found: dict[str, float | None]) -> str:
    if found["value"] is None:
        return "undefined"
    if found["low"] is None:
        return f"{found['value']:.1%} (interval undefined)"
    if found["low"] == found["high"] == 1:  # only if no answer differs from ar's
        return "100.0% (identical texts)"
    return f"{found['value']:.1%} ({found['low']:.1%}–{found['high']:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    if after != before and check:
        sys.exit("docs/measured.md is not what benchmarks/results says; run python benchmarks/result_tables.py")
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
