"""The shipped hybrid: it answers what it was taught, and `verified` answers as `ar` does."""

import dataclasses
from pathlib import Path

import pytest
import torch

import twotower
from twotower.checkpoints.hf import SHIPPED, resolve
from twotower.decoding.modes import Mode
from twotower.eval.answering import answer, mean_score
from twotower.eval.tasks import read_task


@pytest.fixture(scope="module")
def hybrid() -> twotower.TwoTower:
    return twotower.load("hybrid")


def test_both_towers_fit_in_25_mb() -> None:
    assert sum(f.stat().st_size for f in SHIPPED["hybrid"].glob("*.safetensors")) < 25e6


def test_its_name_opens_it_unless_a_directory_has_that_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("hybrid") == SHIPPED["hybrid"]
    with pytest.raises(FileNotFoundError, match="hybrid"):
        resolve(Path("./hybrid"))
    (tmp_path / "hybrid").mkdir()
    assert resolve("hybrid").resolve() == tmp_path / "hybrid"


def test_it_has_every_kind_of_layer(hybrid: twotower.TwoTower) -> None:
    assert set(hybrid.config.pattern) == set("M*-E")


@pytest.mark.parametrize("task", ["lists", "json", "extraction", "functions", "sums", "appointments"])
def test_answers(hybrid: twotower.TwoTower, task: str) -> None:
    questions = read_task(task, limit=24)
    ar, verified, diffusion = (
        answer(hybrid, questions, twotower.SamplingParams(mode=mode, confidence_threshold=0.95, seed=0))
        for mode in ("ar", "verified", "diffusion")
    )
    assert mean_score(ar) > 0.9
    assert [a.text for a in verified] == [a.text for a in ar]
    assert mean_score(diffusion) > 0.85
    # more than one token a pass, in both ways of drafting
    for answers in (verified, diffusion):
        assert sum(a.stats.num_tokens for a in answers) > 2 * sum(a.stats.denoiser_calls for a in answers)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified", "simulated_ar"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neither_a_whole_number_nor_the_default_dtype_changes_an_answer(
    hybrid: twotower.TwoTower, mode: Mode, temperature: float
) -> None:
    """C kernels read float32, whatever PyTorch would make of a Python number."""
    prompt = read_task("lists", limit=1).examples[0].prompt
    exact = twotower.SamplingParams(
        mode=mode, max_new_tokens=20, confidence_threshold=1.0, temperature=temperature, seed=3
    )
    whole = dataclasses.replace(exact, confidence_threshold=1, temperature=int(temperature))
    [expected] = twotower.generate(hybrid, [prompt], exact)
    [found] = twotower.generate(hybrid, [prompt], whole)
    torch.set_default_dtype(torch.float64)
    try:
        [wide] = twotower.generate(hybrid, [prompt], exact)
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (found, wide):
        assert other.token_ids == expected.token_ids
        assert other.confidences == expected.confidences
        assert other.commit_steps == expected.commit_steps
