"""The tables of docs/measured.md are what the committed result files say."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("result_tables", ROOT / "benchmarks" / "result_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def render(tables, tmp_path):
    """The lines of a table made of the given results."""

    def call(name, *results):
        files = []
        for i, result in enumerate(results):
            files.append(f"{i}.json")
            (tmp_path / files[-1]).write_text(json.dumps(result))
        place = f"before\n<!-- table: {name} {' '.join(files)} -->\nold\n<!-- end of table -->\nafter"
        lines = tables.rendered(place, tmp_path).splitlines()
        assert (lines[0], lines[-1]) == ("before", "after")
        assert "old" not in lines
        return lines[2:-2]

    return call


MACHINE = {"cpu": "a CPU", "threads": 2, "torch": "2", "commit": "abc"}


def test_the_page_is_up_to_date(tables):
    page = (ROOT / "docs" / "measured.md").read_text()
    assert "<!-- table: stories_modes " in page
    assert tables.rendered(page) == page


def test_hybrid_decode(render):
    one = {"ms": 2.0, "ms_quartiles": [1.5, 2.5], "ratio_to_larger_floor": 3.21, "times_faster_than_reference": 1.5}
    both = one | {"times_faster_than_transformers": 4.0}
    lines = render("hybrid_decode", MACHINE | {"dtype": "float32", "ar": one, "nfe": both})
    assert lines[2:4] == [
        "| one `ar` step, float32 | 2.0 (1.5–2.5) | 3.2 | 1.50 |  |",
        "| one NFE of 16, float32 | 2.0 (1.5–2.5) | 3.2 | 1.50 | 4.00 |",
    ]
    assert "--dtype float32`, abc, a CPU, 2 threads, torch 2" in lines[-1]


def setting(value, gain):
    quartiles = {"q1": gain - 0.1, "median": gain, "q3": gain + 0.1}
    speed = {} if gain is None else {"1": {"gain": quartiles}}
    return {
        "retention": {"value": value, "low": 0.5, "high": 0.9},
        "tokens_per_nfe": 1.25,
        "tokens_per_context_call": 5.0,
        "speed": speed,
    }


def test_a_mode_that_writes_ars_texts_has_no_interval(tables):
    assert tables._interval({"value": 1.0, "low": 1.0, "high": 1.0}) == "100.0% (identical texts)"
    assert tables._interval({"value": 1.0, "low": 0.9, "high": 1.0}) == "100.0% (90.0%–100.0%)"


def test_evaluation(render):
    overall = {
        "retention": {"value": 0.75, "low": None, "high": None},
        "tasks_in_retention": ["a", "c"],
        "tasks_left_out": {"b": "ar scores 0"},
        "gain": {"1": 2.0, "4": 3.0},
        "tasks_in_gain": {"1": ["a", "c"], "4": ["c"]},
    }
    lines = render(
        "evaluation",
        {
            "command": "twotower eval",
            "commit": None,
            "torch": "2",
            "machine": {"cpu": "a CPU", "threads": 1},
            "overall": {"ar": overall, "diffusion": overall},
            "tasks": {
                "a": {"settings": {"diffusion": setting(0.75, 2.0)}},
                "b": {},
                "c": {"settings": {"diffusion": setting(0.5, 2.0)}},
            },
        },
    )
    assert lines[0] == (
        "| mode | task | of `ar`'s score (95 %) | times `ar`, batch 1 | times `ar`, batch 4 | tokens per NFE "
        "| tokens per pass |"
    )
    assert lines[2:5] == [
        "| `diffusion` | a | 75.0% (50.0%–90.0%) | 2.00 (1.90–2.10) |  | 1.25 | 1.00 |",
        "| `diffusion` | c | 50.0% (50.0%–90.0%) | 2.00 (1.90–2.10) |  | 1.25 | 1.00 |",
        "| `diffusion` | all | 75.0% (interval undefined) | 2.00 | 3.00 (c) |  |  |",
    ]
    assert "`twotower eval`, an unknown commit, a CPU, one thread" in lines[-1]
    assert lines[-1].endswith("b is left out: ar scores 0.")


def test_evaluation_settings(render):
    def overall(gain):
        return {"retention": {"value": 0.75, "low": 0.5, "high": 1.0}, "gain": {"1": gain}}

    names = ("ar", "diffusion γ 0.6", "verified")

    def on(threads, gains):
        return MACHINE | {
            "command": f"twotower eval --json {threads}",
            "machine": {"cpu": "a CPU", "threads": threads},
            "overall": {name: overall(gain) for name, gain in zip(names, gains, strict=True)},
            "tasks": {task: {"settings": {n: {"score": 0.5} for n in names}} for task in ("a", "b")},
        }

    lines = render("evaluation_settings", on(2, (1.0, 1.25, None)), on(1, (1.0, 1.5, 2.0)))
    assert lines[0] == "| mode | a | b | of `ar`'s scores (95 %) | times `ar`, 2 threads | times `ar`, one thread |"
    assert lines[2:5] == [
        "| `ar` | 0.50 | 0.50 |  | 1.00 | 1.00 |",
        "| `diffusion` γ 0.6 | 0.50 | 0.50 | 75.0% (50.0%–100.0%) | 1.25 | 1.50 |",
        "| `verified` | 0.50 | 0.50 | 75.0% (50.0%–100.0%) |  | 2.00 |",
    ]
    assert [line.split("`")[1] for line in lines[6:8]] == ["twotower eval --json 2", "twotower eval --json 1"]


def test_ablations(render):
    variants = ("base", "tied", "joint", "unseeded", "untimed", "curriculum", "distilled")
    measures = ("loss", "drafted_right", "right", "passes", "ar_right")

    def own(start, half):
        return {m: {"mean": start + i, "half_width_95": half} for i, m in enumerate(measures)}

    whole = {v: {"values": own(n, 0.5), "minus_base": own(-n, None)} for n, v in enumerate(variants)}
    shape = {"tokens_per_run": 4096, "seeds": 3, "answers": 7, "threshold": 0.8, "command": "ablations.py A"}
    lines = render("ablations", MACHINE | shape | {"variants": whole, "machine": {"cpu": "a CPU", "threads": 1}})
    assert lines[0].startswith("| 4,096 tokens each | loss, t = 1 | first draft right | answers right, γ 0.8 |")
    assert lines[2].endswith("| 0.000 ± 0.500 | 1.000 ± 0.500 | 2.000 ± 0.500 |  | 3.00 ± 0.50 | 4.000 ± 0.500 |")
    assert lines[3].startswith("| one tower for both | 1.000 ± 0.500 | 2.000 ± 0.500 | 3.000 ± 0.500 | 1.000 | 4.00")
    assert "(`ablations.py A`, abc, a CPU, one thread, torch 2; means of 3 seeds" in lines[-1]
    assert lines[-1].endswith("7 answers)")


def test_levers(render):
    measures = ("verified", "drafted", "diffusion", "tokens_per_nfe", "share", "loss", "bytes")

    def own(start, half):
        values = {m: {"mean": start + i, "half_width_95": half} for i, m in enumerate(measures)}
        return {"values": values, "minus_base": {"diffusion": {"mean": -0.25, "half_width_95": 0.125}}}

    shape = {"tokens_per_run": 4096, "seeds": 3, "answers": 7, "threshold": 0.9, "command": "levers.py A"}
    shape |= {"untrained": dict.fromkeys(measures, 0.5) | {"bytes": 2**20}, "machine": {"cpu": "a CPU", "threads": 1}}
    shape |= {"expected": {"base": "this", "certainty": "that"}}
    lines = render("levers", MACHINE | shape | {"variants": {"base": own(1, 0.5), "certainty": own(2, None)}})
    assert lines[0].startswith("| 4,096 tokens each | expected | tokens per pass, `verified` | per round |")
    assert lines[2] == "| where all start |  | 0.50 | 0.50 | 0.50 | 0.50 | 0.500 |  |"
    assert lines[3] == ("| `base` | this | 1.00 ± 0.50 | 2.00 ± 0.50 | 3.00 ± 0.50 | 4.00 ± 0.50 | 5.000 ± 0.500 |  |")
    assert lines[4] == "| `certainty` | that | 2.00 | 3.00 | 4.00 | 5.00 | 6.000 | -0.25 ± 0.12 |"
    assert "means of 3 seeds" in lines[-1]
    assert lines[-1].endswith("7 answers, 1.0 MB of weights)")


def test_training_law(render):
    points = [
        {"tokens": 4.9e6, "loss": 1.9556, "tokens_per_nfe": 1.2},
        {"tokens": 2e7, "loss": 1.5, "tokens_per_nfe": 1.4},
    ]
    told = {"forecast": 1.1, "forecast_tokens": 1e9, "forecast_range": [1.0, 1.2], "forecast_tokens_per_nfe": 1.58}
    shape = {"points": points, "law": {"floor": 0.99, "scale": 532.6, "exponent": 0.41}, "threshold": 0.8, **told}
    shape |= {"held_out_rows": 192, "command": "training_law.py A", "machine": {"cpu": "a CPU", "threads": 1}}
    lines = render("training_law", MACHINE | shape)
    assert lines[2:5] == [
        "| 4.9 million | 1.956 | 1.20 |",
        "| 20.0 million | 1.500 | 1.40 |",
        "| 1,000 million, by the law | 1.100 (1.000–1.200) | 1.58 |",
    ]
    assert "192 rows; loss(n) = 0.99 + 533 · n^−0.41" in lines[-1]
    lines = render("training_law", MACHINE | shape | {"forecast_range": None})
    assert lines[4].startswith("| 1,000 million, by the law | 1.100 |")


def test_engine_load(render):
    rates = {
        "ar": {"1": 900.4, "16": 5000.0},
        "auto": {"1": 950.0, "16": 4900.0},
        "auto, loss allowed": {"1": 1, "16": 2},
    }
    exact, lossy = ({n: {"best": "ar", "ratio": r} for n in ("1", "16")} for r in (0.98, 0.5))
    found = {"tokens_per_second": rates, "auto_against_best": exact, "lossy_auto_against_best": lossy}
    lines = render("engine_load", MACHINE | {"speeds": found})
    assert lines[0] == "| tokens/s | one request | 16 at a time |"
    assert lines[2:5] == [
        "| `ar` | 900 | 5,000 |",
        "| `auto` | 950 (0.98) | 4,900 (0.98) |",
        "| `auto`, loss allowed | 1 (0.50) | 2 (0.50) |",
    ]


def test_unknown_tables_and_files_are_named(tables, tmp_path):
    with pytest.raises(ValueError, match="'poem'"):
        tables.rendered("<!-- table: poem a.json -->\n<!-- end of table -->")
    with pytest.raises(ValueError, match=r"a\.json"):
        tables.rendered("<!-- table: training_pass a.json -->\n<!-- end of table -->", tmp_path)
